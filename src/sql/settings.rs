//! `SET mistral.on_error = 'fail'`: what a session can choose.

use std::any::Any;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use datafusion::common::config::{ConfigEntry, ConfigExtension, ExtensionOptions};
use datafusion::common::plan_datafusion_err;
use datafusion::config::ConfigOptions;
use datafusion::error::{DataFusionError, Result};

use super::models::ModelRegistry;
use crate::error::nearest_name;

/// What happens when a row fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// Its result is null; `ai_classify` says why in its `error`.
    #[default]
    Null,
    /// The query fails.
    Fail,
}

impl FromStr for OnError {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "null" => Ok(Self::Null),
            "fail" => Ok(Self::Fail),
            _ => Err(format!("mistral.on_error is '{text}'; it has to be 'null' or 'fail'")),
        }
    }
}

impl fmt::Display for OnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Null => "null",
            Self::Fail => "fail",
        })
    }
}

/// A session's settings, by the names `mistral.*`.
#[derive(Debug, Clone)]
pub struct SqlSettings {
    /// `mistral.on_error`
    pub on_error: OnError,
    /// `mistral.window_rows`: rows that are sorted by length together.
    pub window_rows: usize,
    /// `mistral.models.NAME` adds to it.
    models: Arc<ModelRegistry>,
}

/// Rows of a window where nothing is said; the commands' windows are as large.
const DEFAULT_WINDOW_ROWS: usize = 4096;

impl SqlSettings {
    /// The settings of a new session over `models`.
    pub fn new(models: Arc<ModelRegistry>) -> Self {
        Self { on_error: OnError::default(), window_rows: DEFAULT_WINDOW_ROWS, models }
    }

    /// The settings of a session.
    ///
    /// # Errors
    /// When the functions were not registered with it.
    pub fn of(options: &ConfigOptions) -> Result<&Self> {
        options
            .extensions
            .get::<Self>()
            .ok_or_else(|| plan_datafusion_err!("this session has no mistral settings; call sql::register first"))
    }
}

impl ConfigExtension for SqlSettings {
    const PREFIX: &'static str = "mistral";
}

impl ExtensionOptions for SqlSettings {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }

    fn cloned(&self) -> Box<dyn ExtensionOptions> {
        Box::new(self.clone())
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        // DataFusion hands the key over with or without the prefix, by version.
        let key = key.strip_prefix("mistral.").unwrap_or(key);
        match key {
            "on_error" => self.on_error = value.parse().map_err(DataFusionError::Configuration)?,
            "window_rows" => {
                self.window_rows = value.parse().ok().filter(|rows| *rows > 0).ok_or_else(|| {
                    DataFusionError::Configuration(format!(
                        "mistral.window_rows is '{value}'; it has to be a number from 1 on"
                    ))
                })?;
            }
            _ => match key.strip_prefix("models.") {
                Some(name) => {
                    self.models.add(name, value).map_err(|error| DataFusionError::External(Box::new(error)))?
                }
                None => {
                    let known = ["on_error", "window_rows", "models.NAME"];
                    let nearest = nearest_name(key, known)
                        .map_or(String::new(), |name| format!("; did you mean 'mistral.{name}'?"));
                    return Err(DataFusionError::Configuration(format!(
                        "there is no setting 'mistral.{key}'{nearest}"
                    )));
                }
            },
        }
        Ok(())
    }

    fn entries(&self) -> Vec<ConfigEntry> {
        let entry = |key: &str, value: String, description| ConfigEntry {
            key: format!("mistral.{key}"),
            value: Some(value),
            description,
        };
        let mut entries = vec![
            entry(
                "on_error",
                self.on_error.to_string(),
                "A failed row's result is 'null', or it lets the query 'fail'",
            ),
            entry("window_rows", self.window_rows.to_string(), "Rows that are sorted by length together"),
        ];
        entries.extend(self.models.list().iter().map(|model| {
            entry(&format!("models.{}", model.name()), model.path().to_owned(), "The checkpoint folder of a model")
        }));
        entries
    }
}
