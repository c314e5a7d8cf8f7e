//! The program as its users run it: the real binary, real files, exit codes and messages.

mod bad_input;
mod constrained;
mod corpus;
mod devices;
mod errors;
mod eval;
mod faults;
mod formats;
mod fuzzing;
mod generate;
mod goldens;
mod heads;
mod job_files;
mod jobs;
mod kills;
mod memory;
mod messages;
mod order;
mod prompts;
mod row_params;
mod schedulers;
mod support;
