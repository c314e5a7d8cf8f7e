//! The program as its users run it: the real binary, real files, exit codes and messages.

mod errors;
mod formats;
mod goldens;
mod jobs;
mod prompts;
mod support;
