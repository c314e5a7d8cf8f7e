//! DataFusion's errors as the program's, with the exit codes that schedulers read.

use datafusion::error::DataFusionError;
use datafusion::object_store;

use crate::data::store::failure;
use crate::error::{Error, ExitCode, one_line};

/// What a failed statement says in one line, and with which code it ends.
pub fn to_error(error: DataFusionError) -> Error {
    let code = exit_code(&error);
    let message = match own(&error) {
        Some(own) => own.to_string(),
        None => one_line(error.find_root().strip_backtrace()),
    };
    Error::Query { message, code }
}

/// The error of ours that is at the root.
fn own(error: &DataFusionError) -> Option<&Error> {
    match error.find_root() {
        DataFusionError::External(error) => error.downcast_ref(),
        _ => None,
    }
}

fn exit_code(error: &DataFusionError) -> ExitCode {
    if let Some(own) = own(error) {
        return own.exit_code();
    }
    match error.find_root() {
        DataFusionError::SQL(..)
        | DataFusionError::Plan(_)
        | DataFusionError::SchemaError(..)
        | DataFusionError::NotImplemented(_)
        | DataFusionError::Configuration(_) => ExitCode::Usage,
        DataFusionError::ArrowError(..) | DataFusionError::ParquetError(_) | DataFusionError::Execution(_) => {
            ExitCode::InputData
        }
        DataFusionError::ObjectStore(error) => match **error {
            object_store::Error::NotFound { .. } => ExitCode::NoInput,
            object_store::Error::Generic { store: "LocalFileSystem", .. } => ExitCode::Io,
            ref error @ object_store::Error::Generic { .. } => failure(error).kind.exit_code(),
            _ => ExitCode::Io,
        },
        DataFusionError::IoError(_) => ExitCode::Io,
        DataFusionError::ResourcesExhausted(_) => ExitCode::Unavailable,
        DataFusionError::Collection(errors) => errors.first().map_or(ExitCode::Internal, exit_code),
        _ => ExitCode::Internal,
    }
}
