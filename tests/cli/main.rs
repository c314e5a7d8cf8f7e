//! The program as its users run it: the real binary, real files, exit codes and messages.

mod constrained;
mod errors;
mod eval;
mod formats;
mod generate;
mod goldens;
mod heads;
mod job_files;
mod jobs;
mod kills;
mod messages;
mod outlets;
mod prompts;
mod row_params;
mod schedulers;
mod support;
