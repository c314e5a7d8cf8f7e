//! Columns in, columns out: where rows are read from, and how results are committed.
//!
//! Input: [`discover`] finds files, [`dataset`] learns their rows and columns, [`units`] cuts them, [`source`] reads them,
//! [`filter`] drops rows. Output: [`part`] writes one unit, [`commit`] publishes it, [`plan_file`] says what it belongs to,
//! [`single_file`] joins parts, and [`sink`] holds all of it together. Both sides may be in an object [`store`].

pub mod commit;
pub mod dataset;
pub mod digest;
pub mod discover;
mod drift;
pub mod filter;
pub mod format;
pub mod output;
pub mod part;
pub mod plan_file;
pub mod single_file;
pub mod sink;
pub mod source;
pub mod store;
pub mod text_column;
pub mod units;

pub use format::InputFormat;
