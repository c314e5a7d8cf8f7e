//! The program as its users run it: the real binary, real files, exit codes and messages.

mod errors;
mod eval;
mod formats;
mod generate;
mod goldens;
mod heads;
mod jobs;
mod kills;
mod prompts;
mod support;
