//! Messages on standard error: plain lines, or a JSON object a line.
//!
//! The library tells what it does through [`tracing`]; this is where it becomes text. A progress bar steps aside for it.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use clap::ValueEnum;
use indicatif::ProgressBar;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{self, FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::error::{Error, one_line};
use crate::job::{LogFormat, MessageSettings};

/// The bar on the terminal, if there is one.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Begins to write messages as `messages` asks; whoever was first decides.
pub fn start(messages: &MessageSettings) {
    let level = match (messages.quiet, messages.verbose) {
        (true, _) => LevelFilter::ERROR,
        (_, true) => LevelFilter::DEBUG,
        _ => LevelFilter::INFO,
    };
    // Libraries have much to say that helps nobody here.
    let ours = Targets::new().with_target(env!("CARGO_CRATE_NAME"), level);
    let layer = match messages.log_format.unwrap_or(LogFormat::Plain) {
        LogFormat::Plain => fmt::layer().event_format(Plain).with_writer(BesideTheBar).boxed(),
        LogFormat::Json => {
            let json = fmt::layer().json().flatten_event(true).with_current_span(false).with_span_list(false);
            json.with_target(false).with_writer(BesideTheBar).boxed()
        }
    };
    // It fails where messages are written already.
    let _ = tracing_subscriber::registry().with(layer.with_filter(ours)).try_init();
}

/// Tells how the command failed.
pub fn error(error: &Error) {
    let (exit_code, retryable) = (error.exit_code() as u8, error.is_retryable());
    tracing::error!(exit_code, retryable, "{error}");
}

/// The bar that messages are written above from now on; none when it has gone.
pub fn set_bar(bar: Option<ProgressBar>) {
    *BAR.lock().unwrap_or_else(PoisonError::into_inner) = bar;
}

/// What a command line that cannot be understood says of its messages, as far as that can be told.
pub fn settings_of(args: &[OsString]) -> MessageSettings {
    let value_of = |flag: &str| -> Option<OsString> {
        let mut args = args.iter().take_while(|arg| *arg != "--");
        while let Some(arg) = args.next() {
            let Some(rest) = arg.to_str().and_then(|arg| arg.strip_prefix(flag)) else { continue };
            match rest.strip_prefix('=') {
                Some(value) => return Some(value.into()),
                None if rest.is_empty() => return args.next().cloned(),
                None => {}
            }
        }
        let variable = flag.trim_start_matches('-').replace('-', "_").to_uppercase();
        std::env::var_os(format!("MISTRAL_BATCH_{variable}"))
    };
    let path_of = |flag: &str| value_of(flag).filter(|path| !path.is_empty()).map(PathBuf::from);
    let format = value_of("--log-format");
    MessageSettings {
        report: path_of("--report"),
        prometheus: path_of("--prometheus"),
        log_format: format.as_deref().and_then(OsStr::to_str).and_then(|name| LogFormat::from_str(name, false).ok()),
        ..MessageSettings::default()
    }
}

/// The first line of the parser's message, which begins with what is wrong.
pub fn usage_error(error: &clap::Error) -> Error {
    let message = one_line(error.to_string());
    Error::Usage(message.strip_prefix("error: ").unwrap_or(&message).to_owned())
}

/// The message alone, and what kind it is where it is bad news.
struct Plain;

impl<S, N> FormatEvent<S, N> for Plain
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> std::fmt::Result {
        let mut message = Message(String::new());
        event.record(&mut message);
        let kind = match *event.metadata().level() {
            Level::ERROR => "error: ",
            Level::WARN => "warning: ",
            _ => "",
        };
        writeln!(writer, "{kind}{}", message.0)
    }
}

/// The text of an event.
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            // A String takes everything.
            let _ = write!(self.0, "{value:?}");
        }
    }
}

/// Standard error, above the bar where there is one.
struct BesideTheBar;

impl<'a> MakeWriter<'a> for BesideTheBar {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        Self
    }
}

impl Write for BesideTheBar {
    /// Each event comes whole.
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let bar = BAR.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match bar {
            // A bar that was never drawn must not be: it has no length yet.
            Some(bar) if bar.length().is_some() => bar.suspend(|| io::stderr().write_all(text))?,
            _ => io::stderr().write_all(text)?,
        }
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_and_format_are_found_in_a_command_line_that_is_wrong() {
        let settings = |args: &[&str]| settings_of(&args.iter().map(OsString::from).collect::<Vec<_>>());
        let found = settings(&["classify", "--reprot", "--report", "a b.json", "--log-format=json"]);
        assert_eq!((found.report, found.log_format), (Some("a b.json".into()), Some(LogFormat::Json)));
        let found = settings(&["classify", "--report=x", "--log-format", "yaml", "--", "--log-format=json"]);
        assert_eq!((found.report, found.log_format), (Some("x".into()), None));
        assert!(settings(&["classify", "--report"]).report.is_none());
    }
}
