//! The `mistral-batch` program: everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    mistral_batch::cli::main()
}
