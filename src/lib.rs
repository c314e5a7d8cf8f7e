//! mistral-batch runs Mistral models over whole datasets, offline, on one machine.
//!
//! # The path of one row
//!
//! 1. [`job`] checks the request against the data and the checkpoint, cuts every input file into **units** (row
//!    ranges), and opens the output. Nothing is computed until everything that can be wrong was looked at.
//! 2. [`data`] reads a unit as a stream of windows: some thousand consecutive rows as an Arrow `RecordBatch`. `--where`
//!    drops rows here. Whether the bytes are a file's or an object's, only `data::store` knows.
//! 3. [`text`] renders each row's prompt and tokenizes it on all cores, as transformers would: it becomes a [`batch::Sequence`].
//! 4. [`batch`] sorts the window's sequences by length and cuts left-padded batches under a token budget; at the model's
//!    door the padding is dropped, so that it costs no arithmetic.
//! 5. [`model`] computes hidden states, token by token of all rows end to end, with the operations of [`kernels`], which
//!    has the code of each device: on the CPU attention over all rows, and between two of them blocks of rows that stay in a
//!    core's cache. One of [`heads`] reads its answer off them.
//!    A text to be completed goes another way here: [`generation`] keeps it live over many steps, one token each, with its
//!    keys and values in a rolling cache.
//! 6. [`engine`] hands each answer back to its row, so that the output's order is the input's.
//! 7. [`data`] writes the unit's **part** and commits it: the part is there whole or not at all, and its footer says which
//!    rows of which job it holds. A killed job goes on after its last part.
//!
//! Reading, tokenizing, computing and writing overlap: [`job`] joins them by bounded channels.
//!
//! # Floors
//!
//! Modules import strictly downwards: error · batch, kernels · data, text, model · heads · generation · engine · job, sql ·
//! eval · cli.

pub mod batch;
pub mod cli;
pub mod data;
pub mod engine;
pub mod error;
pub mod eval;
pub mod generation;
pub mod heads;
pub mod job;
pub mod kernels;
pub mod model;
pub mod sql;
pub mod text;

pub use error::{Error, ExitCode, Result};
