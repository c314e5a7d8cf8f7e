//! mistral-batch runs Mistral models over whole datasets offline.

pub mod data;
pub mod error;
pub mod kernels;

pub use error::{Error, ExitCode, Result};
