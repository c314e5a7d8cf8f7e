//! `FROM 'data.parquet'`: files, globs and folders as tables, in object stores too.

use std::fmt;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use datafusion::catalog::{DynamicFileCatalog, TableProvider, UrlTableFactory};
use datafusion::datasource::file_format::FileFormat;
use datafusion::datasource::file_format::arrow::ArrowFormat;
use datafusion::datasource::file_format::csv::CsvFormat;
use datafusion::datasource::file_format::json::JsonFormat;
use datafusion::datasource::file_format::parquet::ParquetFormat;
use datafusion::datasource::listing::{ListingOptions, ListingTable, ListingTableConfig, ListingTableUrl};
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::session_state::SessionState;
use datafusion::prelude::SessionContext;
use futures::TryStreamExt;
use object_store::ObjectStore;

use crate::data::store::Stores;
use crate::error::Error;

/// The extensions that are read, with what they mean.
const EXTENSIONS: [&str; 5] = ["parquet", "arrow", "csv", "jsonl", "json"];

/// The same session, in which a path in quotes is a table.
///
/// A folder is read as the files of the first extension in it that is known; names beginning with `_` or `.` are passed
/// over, so that what a job wrote is a table, too.
pub fn with_file_tables(context: SessionContext) -> SessionContext {
    let factory = Arc::new(FileTables { session: OnceLock::new() });
    let catalogs = context.state().catalog_list().clone();
    let session_id = context.session_id();
    let context: SessionContext = context
        .into_state_builder()
        .with_session_id(session_id)
        .with_catalog_list(Arc::new(DynamicFileCatalog::new(catalogs, factory.clone())))
        .build()
        .into();
    let state = context.state_weak_ref();
    let session: CurrentSession = Box::new(move || state.upgrade().map(|state| state.read().clone()));
    // Set once, a line after the factory was made.
    let _ = factory.session.set(session);
    context
}

type CurrentSession = Box<dyn Fn() -> Option<SessionState> + Send + Sync>;

/// Makes tables of paths.
struct FileTables {
    /// The session's state as it is now; it holds the factory itself.
    session: OnceLock<CurrentSession>,
}

impl fmt::Debug for FileTables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FileTables")
    }
}

#[async_trait]
impl UrlTableFactory for FileTables {
    async fn try_new(&self, path: &str) -> Result<Option<Arc<dyn TableProvider>>> {
        // A name without a dot or a slash is a table's.
        if !path.contains(['.', '/']) && !std::path::Path::new(path).exists() {
            return Ok(None);
        }
        let Some(state) = self.session.get().and_then(|session| session()) else { return Ok(None) };
        let Ok(url) = ListingTableUrl::parse(path) else { return Ok(None) };
        let store = match state.runtime_env().object_store(&url) {
            Ok(store) => store,
            // The session's own stores go first; ours are those that a job reads.
            Err(_) => {
                let Some(store) = store_of(path).map_err(|error| DataFusionError::External(Box::new(error)))? else {
                    return Ok(None);
                };
                state.runtime_env().register_object_store(url.object_store().as_ref(), store.clone());
                store
            }
        };
        let mut files = url.list_all_files(&state, store.as_ref(), "").await?;
        let mut extension = None;
        loop {
            let file = match files.try_next().await {
                Ok(file) => file,
                Err(error) => match no_such_file(path) {
                    Some(missing) => return Err(missing),
                    None => return Err(error),
                },
            };
            let Some(file) = file else { break };
            let Some(name) = file.location.filename() else { continue };
            let known = name.rsplit_once('.').and_then(|(_, end)| EXTENSIONS.iter().find(|known| **known == end));
            if let (Some(known), false) = (known, name.starts_with(['_', '.'])) {
                extension = Some(*known);
                break;
            }
        }
        drop(files);
        let Some(extension) = extension else {
            return match no_such_file(path) {
                Some(error) => Err(error),
                None => Err(DataFusionError::External(Box::new(Error::NoInput {
                    path: path.into(),
                    message: format!("holds no file that is read as a table: {}", EXTENSIONS.join(", ")),
                }))),
            };
        };
        let format: Arc<dyn FileFormat> = match extension {
            "parquet" => Arc::new(ParquetFormat::default()),
            "arrow" => Arc::new(ArrowFormat),
            "csv" => Arc::new(CsvFormat::default().with_has_header(true)),
            _ => Arc::new(JsonFormat::default()),
        };
        let options = ListingOptions::new(format).with_file_extension(format!(".{extension}"));
        let schema = options.infer_schema(&state, &url).await?;
        let config = ListingTableConfig::new(url).with_listing_options(options).with_schema(schema);
        Ok(Some(Arc::new(ListingTable::try_new(config)?)))
    }
}

/// The object store that a URL leads to.
fn store_of(path: &str) -> crate::Result<Option<Arc<dyn ObjectStore>>> {
    let location = Stores::default().locate(path)?;
    let Some(object) = location.object() else { return Ok(None) };
    // A session knows stores by their host alone.
    if object.base().starts_with("https://") || object.base().contains('@') {
        return Err(Error::Usage(format!("{path}: SQL knows s3://BUCKET, gs://BUCKET and az://CONTAINER only")));
    }
    Ok(Some(object.store().clone()))
}

/// The error of a path that is not there; a name that may be a table's is none.
fn no_such_file(path: &str) -> Option<DataFusionError> {
    let is_path = path.contains('/') || EXTENSIONS.iter().any(|extension| path.ends_with(&format!(".{extension}")));
    let is_local = !path.contains("://") && !path.contains(['*', '?', '[']);
    (is_path && is_local && !std::path::Path::new(path).exists()).then(|| {
        DataFusionError::External(Box::new(Error::NoInput {
            path: path.into(),
            message: "no such file or folder".into(),
        }))
    })
}
