//! `mistral-batch sql`.

mod output;
mod progress;
mod repl;
mod statements;

use std::io::{IsTerminal, Read, stdin, stdout};
use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use datafusion::execution::memory_pool::FairSpillPool;
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::prelude::{SessionConfig, SessionContext};

use crate::error::{Error, Result};
use crate::job::{DeviceChoice, ProgressMode, count};
use crate::sql::{ModelRegistry, RegistryOptions, register, to_error, with_file_tables};
use output::Output;
use progress::QueryProgress;
use statements::Session;

/// Query files and tables with SQL in which models are functions.
///
/// ai_classify, ai_classify_scores, ai_score, ai_tag, ai_generate, ai_embed and ai_logprob compute each row once, however
/// often a query uses the result. A path in quotes is a table; the table mistral.models lists the models.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mistral-batch sql --model tickets=./ticket-classifier -c \"SELECT id, ai_classify(text).label FROM 'tickets.parquet' LIMIT 10\"
  mistral-batch sql --model tickets=./ticket-classifier -f report.sql --format csv > report.csv
  mistral-batch sql --model m=org/name -c \"COPY (SELECT *, ai_generate(prompt, 'm', {max_tokens: 60}) AS answer FROM 'in/') TO 'answers.parquet'\"")]
pub struct SqlArgs {
    /// Statements to run, ending in semicolons where there are several; repeatable
    #[arg(short, long, value_name = "SQL", help_heading = "Statements")]
    command: Vec<String>,

    /// File with statements to run; repeatable, before any --command
    #[arg(short, long, value_name = "FILE", help_heading = "Statements")]
    file: Vec<PathBuf>,

    /// Model that queries can use, by its name; repeatable. Without a name it has its folder's
    #[arg(long, value_name = "NAME=DIR|ID", help_heading = "Model")]
    model: Vec<String>,

    /// Where to compute
    #[arg(long, value_name = "auto|cpu|cuda:0", default_value = "auto", help_heading = "Model")]
    device: DeviceChoice,

    /// How results are printed
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "table", help_heading = "Messages")]
    format: Format,

    /// Tokens of a batch, padding included; accepts 16k
    #[arg(long, visible_alias = "max-num-batched-tokens", value_name = "TOKENS", value_parser = count,
        default_value_t = RegistryOptions::default().max_batch_tokens as u64, help_heading = "Running")]
    max_batch_tokens: u64,

    /// Memory for keys and values of a query's live completions, in bytes; accepts 512M and 2G
    #[arg(long, value_name = "BYTES", value_parser = count,
        default_value_t = RegistryOptions::default().kv_cache_bytes as u64, help_heading = "Running")]
    kv_cache_memory: u64,

    /// Memory for rows that queries hold, beside the models [default: no limit]
    #[arg(long, value_name = "BYTES", value_parser = count, help_heading = "Running")]
    memory_limit: Option<u64>,

    /// Threads to compute with [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Running")]
    threads: Option<u64>,

    /// How to show progress on standard error
    #[arg(long, value_enum, value_name = "HOW", default_value = "auto", help_heading = "Messages")]
    progress: ProgressMode,

    /// Show errors only
    #[arg(short, long, help_heading = "Messages")]
    quiet: bool,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Columns drawn with lines, once all rows are there
    Table,
    /// A header and a line for each row; nested values are JSON
    Csv,
    /// A JSON object a line
    Json,
    /// A Parquet file, of one statement's rows
    Parquet,
}

impl SqlArgs {
    pub fn run(self) -> Result<()> {
        let devices = self.device.open()?;
        super::job::use_threads(self.threads)?;
        if let Some(notice) = &devices.notice {
            tracing::warn!("{notice}");
        }
        if devices.iter().count() > 1 {
            return Err(Error::Usage(format!("--device {}: queries compute on one device", self.device)));
        }
        let options = RegistryOptions {
            device: devices.first().clone(),
            max_batch_tokens: self.max_batch_tokens as usize,
            kv_cache_bytes: usize::try_from(self.kv_cache_memory).unwrap_or(usize::MAX),
        };
        let models = Arc::new(ModelRegistry::new(options));
        for model in &self.model {
            let (name, path) = named_model(model)?;
            models.add(name, path)?;
        }
        let is_terminal = stdin().is_terminal();
        let mut scripts = Vec::new();
        for file in &self.file {
            let text = std::fs::read_to_string(file).map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => {
                    Error::NoInput { path: file.clone(), message: "no such file, which --file names".into() }
                }
                _ => Error::io("read", file)(error),
            })?;
            scripts.push((format!("{}: ", file.display()), text));
        }
        scripts.extend(self.command.iter().map(|text| (String::new(), text.clone())));
        if scripts.is_empty() && !is_terminal {
            let mut text = String::new();
            stdin().read_to_string(&mut text).map_err(Error::io("read", "standard input"))?;
            scripts.push((String::new(), text));
        }
        if self.format == Format::Parquet && stdout().is_terminal() {
            return Err(Error::Usage("--format parquet writes bytes to standard output; send them to a file".into()));
        }

        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .map_err(|error| Error::Internal(format!("cannot start the runtime: {error}")))?;
        let interactive = scripts.is_empty();
        let progress = QueryProgress::new(self.progress, self.quiet, models.progress().clone());
        let context = runtime.block_on(async { self.context(models) })?;
        let mut session = Session::new(context, Output::new(self.format), progress, self.quiet);
        let result = if interactive {
            repl::run(&runtime, &mut session)
        } else {
            let mut result = Ok(());
            for (place, text) in &scripts {
                result = runtime.block_on(session.run_script(text, place));
                if result.is_err() {
                    break;
                }
            }
            result.and_then(|()| session.finish())
        };
        // What a cancelled query left to compute ends with its batch; nobody waits for it.
        runtime.shutdown_background();
        result
    }

    fn context(&self, models: Arc<ModelRegistry>) -> Result<SessionContext> {
        let mut config = SessionConfig::new().with_information_schema(true);
        if let Some(threads) = self.threads {
            config = config.with_target_partitions(threads as usize);
        }
        let mut environment = RuntimeEnvBuilder::new();
        if let Some(bytes) = self.memory_limit {
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            environment = environment.with_memory_pool(Arc::new(FairSpillPool::new(bytes)));
        }
        let environment = environment.build_arc().map_err(to_error)?;
        let context = with_file_tables(SessionContext::new_with_config_rt(config, environment));
        register(&context, models).map_err(to_error)?;
        Ok(context)
    }
}

/// `NAME=DIR`, or a path whose last part is the name.
fn named_model(text: &str) -> Result<(&str, &str)> {
    if let Some((name, path)) = text.split_once('=')
        && !name.contains('/')
    {
        return Ok((name, path));
    }
    let name = text.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let name = name.split('@').next().unwrap_or_default();
    match name.is_empty() || name.starts_with('.') {
        true => Err(Error::Usage(format!("--model {text}: give it a name, as in --model NAME={text}"))),
        false => Ok((name, text)),
    }
}

#[cfg(test)]
mod tests {
    use super::named_model;

    #[test]
    fn models_have_their_own_or_their_folders_name() {
        assert_eq!(named_model("t=models/tickets").unwrap(), ("t", "models/tickets"));
        assert_eq!(named_model("models/tickets/").unwrap(), ("tickets", "models/tickets/"));
        assert_eq!(named_model("org/name@v2").unwrap(), ("name", "org/name@v2"));
        assert_eq!(named_model("runs/a=b/model").unwrap(), ("model", "runs/a=b/model"));
        assert!(named_model("..").unwrap_err().to_string().contains("--model NAME=.."));
    }
}
