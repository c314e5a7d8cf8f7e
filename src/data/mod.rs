//! Columns in, columns out.

pub mod dataset;
pub mod discover;
mod drift;
pub mod format;
pub mod source;
pub mod text_column;
pub mod units;
