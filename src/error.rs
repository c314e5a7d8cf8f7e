//! The one error type of the crate: what went wrong, where, what to do, and which exit code says so.
//!
//! Each variant renders as one line for standard error. Schedulers read [`Error::exit_code`],
//! which follows sysexits.h.

use std::io;
use std::path::{Path, PathBuf};

/// The crate's result type.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Exit statuses of the program, as schedulers read them (sysexits.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// Everything was done.
    Done = 0,
    /// The command line is wrong, or names a column that is not there.
    Usage = 64,
    /// The input is corrupt, drifts in schema, changed while it was read, or held too many bad rows.
    InputData = 65,
    /// There is no such input.
    NoInput = 66,
    /// The device or a service is not available.
    Unavailable = 69,
    /// A bug in this program.
    Internal = 70,
    /// The output cannot be created.
    CannotCreate = 73,
    /// Reading or writing failed, a full disk among it.
    Io = 74,
    /// The same command again may go through.
    TryAgain = 75,
    /// The job file or the checkpoint is unusable.
    Config = 78,
    /// Stopped by SIGINT; resumable.
    Interrupted = 130,
    /// Stopped by SIGTERM; resumable.
    Terminated = 143,
}

/// Everything that can stop a run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A flag or a combination of flags makes no sense.
    #[error("{0}")]
    Usage(String),

    /// A column that was asked for is not in the input.
    #[error("no column '{column}' in {path}: {}; name it with {flag}", describe_columns(.nearest, .available))]
    ColumnMissing {
        column: String,
        path: PathBuf,
        /// The flag that names the column.
        flag: &'static str,
        nearest: Option<String>,
        available: Vec<String>,
    },

    /// A column has a type that the command cannot use.
    #[error(
        "column '{column}' in {path} has type {found}, but {expected} is needed; choose another column with {flag}"
    )]
    ColumnType { column: String, path: PathBuf, found: String, expected: &'static str, flag: &'static str },

    /// A result column would hide a column of the input.
    #[error(
        "result column '{column}' would collide with a column of the input; give --prefix NAME_ or drop it with --keep"
    )]
    ColumnCollision { column: String },

    /// Nothing is there to be read.
    #[error("{path}: {message}")]
    NoInput { path: PathBuf, message: String },

    /// A file cannot be decoded.
    #[error("{path}{place}: {message}; the file is damaged or not what its name says")]
    InputCorrupt {
        path: PathBuf,
        /// Where in the file, as ", row group 3", or empty.
        place: String,
        message: String,
    },

    /// Two input files disagree about a column.
    #[error(
        "{second} does not fit {first}: column '{column}' is {second_type}, not {first_type}; convert one of them or run them apart"
    )]
    SchemaDrift { first: PathBuf, second: PathBuf, column: String, first_type: String, second_type: String },

    /// An input file is not the one that was planned.
    #[error("{path}: changed since the job was planned ({message}); restore it, or start again with --overwrite")]
    InputChanged { path: PathBuf, message: String },

    /// More rows failed than the settings allow.
    #[error("{errors} row(s) failed, {allowed} allowed; first: row {row} of {path}: {message}")]
    TooManyRowErrors { errors: u64, allowed: u64, path: PathBuf, row: u64, message: String },

    /// A row of a query failed, and the session wants the query to fail with it.
    #[error("{function}: a row failed: {message}; with SET mistral.on_error = 'null' its result is null instead")]
    RowFailed { function: &'static str, message: String },

    /// The device that was asked for cannot be used.
    #[error("device {device}: {message}")]
    Device { device: String, message: String },

    /// The output path holds something that must not be touched, or cannot be made.
    #[error("{path}: {message}")]
    CannotCreate { path: PathBuf, message: String },

    /// The operating system refused to read or write.
    #[error("cannot {action} {path}: {source}{}", io_hint(.source))]
    Io { action: &'static str, path: PathBuf, source: io::Error },

    /// Another run works on this output.
    #[error("{path}: another run holds this output; wait for it to end, or choose another --output")]
    OutputLocked { path: PathBuf },

    /// The output belongs to a job with other settings.
    #[error("{path}: holds another job ({difference}); choose another --output, or redo it with --overwrite")]
    AnotherJob { path: PathBuf, difference: String },

    /// A checkpoint, tokenizer or job file is unusable.
    #[error("{path}: {message}")]
    Config { path: PathBuf, message: String },

    /// A signal asked the run to stop.
    #[error("stopped by {}; run the same command with --resume to go on", if *.signal == SIGTERM { "SIGTERM" } else { "SIGINT" })]
    Stopped { signal: i32 },

    /// As [`Error::Stopped`], of a command that goes on with its own output when it is run again.
    #[error("stopped by {}; the same command again goes on from here", if *.signal == SIGTERM { "SIGTERM" } else { "SIGINT" })]
    Paused { signal: i32 },

    /// A statement failed, or was cancelled.
    #[error("{message}")]
    Query { message: String, code: ExitCode },

    /// Something that should not happen did.
    #[error("internal error: {0}; please report it with the command that led here")]
    Internal(String),
}

/// The number of SIGINT on every platform that we run on.
pub const SIGINT: i32 = 2;
/// The number of SIGTERM on every platform that we run on.
pub const SIGTERM: i32 = 15;

impl Error {
    /// The exit status that tells a scheduler what kind of failure this is.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Error::Usage(_)
            | Error::ColumnMissing { .. }
            | Error::ColumnType { .. }
            | Error::ColumnCollision { .. } => ExitCode::Usage,
            Error::InputCorrupt { .. }
            | Error::SchemaDrift { .. }
            | Error::InputChanged { .. }
            | Error::TooManyRowErrors { .. }
            | Error::RowFailed { .. } => ExitCode::InputData,
            Error::NoInput { .. } => ExitCode::NoInput,
            Error::Device { .. } => ExitCode::Unavailable,
            Error::Query { code, .. } => *code,
            Error::Internal(_) => ExitCode::Internal,
            Error::CannotCreate { .. } => ExitCode::CannotCreate,
            Error::Io { .. } => ExitCode::Io,
            Error::OutputLocked { .. } => ExitCode::TryAgain,
            Error::AnotherJob { .. } | Error::Config { .. } => ExitCode::Config,
            Error::Stopped { signal: SIGTERM } | Error::Paused { signal: SIGTERM } => ExitCode::Terminated,
            Error::Stopped { .. } | Error::Paused { .. } => ExitCode::Interrupted,
        }
    }

    /// Whether the same run again may go through without anybody doing anything, as schedulers want to know.
    pub fn is_retryable(&self) -> bool {
        match self {
            Error::Stopped { .. } => false,
            error => {
                matches!(error.exit_code(), ExitCode::TryAgain | ExitCode::Interrupted | ExitCode::Terminated)
            }
        }
    }

    /// The same error of a command that goes on with its own output when it is run again.
    pub fn resumed_by_a_rerun(self) -> Error {
        match self {
            Error::Stopped { signal } => Error::Paused { signal },
            error => error,
        }
    }

    /// An I/O failure while doing `action` ("read", "write", "fsync", …) on `path`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Error {
        let path = path.as_ref().to_owned();
        move |source| Error::Io { action, path, source }
    }

    /// A damaged file, without a finer place than the file.
    pub fn corrupt(path: impl AsRef<Path>, message: impl ToString) -> Error {
        Error::InputCorrupt { path: path.as_ref().to_owned(), place: String::new(), message: one_line(message) }
    }

    /// An unusable checkpoint, tokenizer or job file.
    pub fn config(path: impl AsRef<Path>, message: impl ToString) -> Error {
        Error::Config { path: path.as_ref().to_owned(), message: one_line(message) }
    }

    /// A column that is not in `available`, with the nearest name there.
    pub fn column_missing<'a>(
        column: &str,
        path: impl AsRef<Path>,
        flag: &'static str,
        available: impl IntoIterator<Item = &'a str>,
    ) -> Error {
        let available: Vec<String> = available.into_iter().map(str::to_owned).collect();
        let nearest = nearest_name(column, available.iter().map(String::as_str)).map(str::to_owned);
        Error::ColumnMissing { column: column.to_owned(), path: path.as_ref().to_owned(), flag, nearest, available }
    }
}

impl From<candle_core::Error> for Error {
    /// Shapes and dtypes are checked where weights are loaded, so a failing tensor operation is a bug.
    fn from(error: candle_core::Error) -> Self {
        Error::Internal(one_line(error))
    }
}

impl From<arrow::error::ArrowError> for Error {
    /// Inputs are decoded with their own error mapping, so a failing array operation is a bug.
    fn from(error: arrow::error::ArrowError) -> Self {
        Error::Internal(one_line(error))
    }
}

/// The candidate that is most likely meant by a mistyped `name`, if any is near.
pub fn nearest_name<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = name.to_lowercase();
    candidates
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(&lower, &candidate.to_lowercase()), candidate))
        .filter(|(similarity, _)| *similarity >= 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// The first line of a library's message, so that our errors stay one line each.
pub fn one_line(message: impl ToString) -> String {
    message.to_string().lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default().to_owned()
}

fn describe_columns(nearest: &Option<String>, available: &[String]) -> String {
    match nearest {
        Some(name) => format!("did you mean '{name}'?"),
        None if available.is_empty() => "it has no columns".to_owned(),
        None => format!("it has {}", available.join(", ")),
    }
}

fn io_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull => "; free some space and run the same command with --resume",
        io::ErrorKind::QuotaExceeded => "; raise the quota and run the same command with --resume",
        io::ErrorKind::PermissionDenied => "; check its permissions",
        _ => "",
    }
}
