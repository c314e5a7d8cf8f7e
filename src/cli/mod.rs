//! The command line: flags become typed specifications once; one file a command.

mod completions;
mod eval;
mod inspect;
mod job;
mod log;
mod outlets;
mod progress;
mod run;
mod schemas;
mod sql;

use std::any::Any;
use std::ffi::OsString;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode as ProcessExitCode;

use clap::builder::BoolishValueParser;
use clap::error::ErrorKind;
use clap::{ArgAction, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::error::{Error, ExitCode, Result, one_line};
use crate::job::{JobSettings, LogFormat, MessageSettings};

/// Runs Mistral models over whole datasets, offline: Parquet, Arrow, CSV or JSONL in; the same rows with their results out.
#[derive(Debug, Parser)]
#[command(name = "mistral-batch", version, propagate_version = true, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Job(JobSettings),
    Run(run::RunArgs),
    Check(run::CheckArgs),
    #[command(hide = true)]
    Schemas(schemas::SchemasArgs),
    Eval(eval::EvalArgs),
    Sql(Box<sql::SqlArgs>),
    Inspect(inspect::InspectArgs),
    Completions(completions::CompletionsArgs),
}

const AFTER_HELP: &str = "\
Examples:
  mistral-batch classify -i tickets.parquet --model ./ticket-classifier -o tickets-labelled
  mistral-batch classify -i 'logs/*.jsonl' --text-column message --model org/name -o labelled.parquet
  mistral-batch embed -i docs.parquet --model org/embedder --pooling mean --normalize -o vectors
  mistral-batch score -i essays.parquet --model org/mistral --logprobs -o likelihoods
  mistral-batch tag -i letters.parquet --model ./pii-tagger --aggregation first -o found.jsonl
  mistral-batch sql --model t=./ticket-classifier -c \"SELECT ai_classify(text).label FROM 'tickets.parquet'\"
  mistral-batch inspect ./ticket-classifier

Every long flag of a command can be given as an environment variable, --max-length as MISTRAL_BATCH_MAX_LENGTH.
Exit codes: 0 done; 64 usage; 65 input corrupt or too many failed rows; 66 no input; 69 device not available; 70 a bug;
73 cannot create the output; 74 I/O error; 75 try again; 78 bad checkpoint or job; 130, 143 stopped by a signal.";

/// Parses the process's arguments, runs the command, and says how it ended.
pub fn main() -> ProcessExitCode {
    // A panic is caught where it happens and told as an error, in one line; its trace is for those who ask for it.
    if std::env::var_os("RUST_BACKTRACE").is_none_or(|wanted| wanted == "0") {
        std::panic::set_hook(Box::new(|_| {}));
    }
    let args: Vec<OsString> = std::env::args_os().collect();
    let code = match parse(args.clone()) {
        Ok(cli) => match catch_unwind(AssertUnwindSafe(|| cli.run())).unwrap_or_else(|panic| Err(bug(&*panic))) {
            Ok(()) => ExitCode::Done,
            Err(error) => {
                // Where the command did not come to it.
                log::start(&log::settings_of(&args));
                log::error(&error);
                error.exit_code()
            }
        },
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            // A closed pipe is no reason to change how the command ended.
            let _ = error.print();
            ExitCode::Done
        }
        Err(error) => {
            refuse(&error, &log::settings_of(&args));
            ExitCode::Usage
        }
    };
    ProcessExitCode::from(code as u8)
}

/// Tells of a command line that is wrong: with the parser's hints for a person, on one line where JSON was asked for.
fn refuse(error: &clap::Error, messages: &MessageSettings) {
    let usage = log::usage_error(error);
    let usage = job::refused(messages, "", usage);
    match messages.log_format {
        Some(LogFormat::Json) => log::error(&usage),
        // A closed pipe is no reason to change how the command ended.
        _ => drop(error.print()),
    }
}

/// The error of a panic that nothing else caught.
fn bug(panic: &(dyn Any + Send)) -> Error {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    Error::Internal(format!("{}; RUST_BACKTRACE=1 tells where", one_line(text.unwrap_or("a panic"))))
}

fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let matches = command().try_get_matches_from(args)?;
    Cli::from_arg_matches(&matches)
}

/// The command line with an environment variable for every long flag.
fn command() -> clap::Command {
    Cli::command().mut_subcommands(|subcommand| {
        subcommand.mut_args(|arg| {
            let Some(variable) = environment_variable(&arg) else { return arg };
            let arg = arg.env(variable).hide_env(true);
            match arg.get_action() {
                // In the environment a switch has a value: 1, true, yes and on, or their opposites.
                ArgAction::SetTrue => arg.value_parser(BoolishValueParser::new()),
                _ => arg,
            }
        })
    })
}

fn environment_variable(arg: &clap::Arg) -> Option<String> {
    let long = arg.get_long().filter(|long| !matches!(*long, "help" | "version"))?;
    Some(format!("MISTRAL_BATCH_{}", long.replace('-', "_").to_uppercase()))
}

impl Cli {
    fn run(self) -> Result<()> {
        match self.command {
            Command::Job(settings) => {
                let messages = settings.messages().clone();
                job::run(settings.into_job().map_err(|error| job::refused(&messages, "", error))?)
            }
            Command::Run(args) => args.run(),
            Command::Check(args) => args.run(),
            Command::Schemas(args) => args.run(),
            Command::Eval(args) => args.run(),
            Command::Sql(args) => args.run(),
            Command::Inspect(args) => args.run(),
            Command::Completions(args) => args.run(),
        }
    }
}

/// Writes to standard output; a reader that has seen enough is no failure.
fn print(text: &str) -> Result<()> {
    use std::io::Write;
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::io("write to", "standard output")(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn every_long_flag_reads_the_environment_and_explains_itself() {
        for subcommand in command().get_subcommands() {
            let mut variables = BTreeSet::new();
            for arg in subcommand.get_arguments().filter(|arg| arg.get_long().is_some()) {
                let variable = environment_variable(arg).unwrap();
                assert_eq!(arg.get_env().unwrap().to_str(), Some(&variable[..]));
                assert!(variables.insert(variable));
                assert!(arg.get_help().is_some(), "--{} has no help", arg.get_long().unwrap());
            }
        }
    }
}
