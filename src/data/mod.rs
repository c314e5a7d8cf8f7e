//! Columns in, columns out.

pub mod commit;
pub mod output;
pub mod part;
pub mod plan_file;
pub mod single_file;
pub mod sink;
