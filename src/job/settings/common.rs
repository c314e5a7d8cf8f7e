//! The settings that every command with a model has.

use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};
use schemars::JsonSchema;

use super::values::{Count, count};
use super::{Job, MessageSettings};
use crate::data::format::InputFormat;
use crate::data::sink::OnExisting;
use crate::data::store::Stores;
use crate::job::{CommandSpec, DEFAULT_WINDOW_BYTES, DeviceChoice, JobSpec, PromptSpec};
use crate::model::ComputeDtype;
use crate::text::Overflow;

#[derive(Debug, Clone, Args, JsonSchema)]
pub struct CommonSettings {
    /// Dataset to read: a file, a glob or a folder (with key=value subfolders as columns), a path or a URL; repeatable
    #[arg(short, long, value_name = "PATH|GLOB|DIR|URL", required = true, value_hint = ValueHint::AnyPath, help_heading = "Data")]
    input: Vec<String>,

    /// Where to write: a folder of Parquet parts, or one file ending in .parquet, .arrow, .jsonl or .csv; a path or a URL
    #[arg(short, long, value_name = "PATH|URL", value_hint = ValueHint::AnyPath, help_heading = "Data")]
    output: PathBuf,

    /// Read files as this format [default: by extension]
    #[arg(long, value_name = "FORMAT", help_heading = "Data")]
    #[schemars(with = "Option<InputFormatName>")]
    input_format: Option<InputFormat>,

    /// Column that holds the text
    #[arg(long, value_name = "COLUMN", default_value = "text", help_heading = "Data")]
    text_column: String,

    /// Instead of a text column, a text with columns in braces: "Subject: {subject}"; literal braces are doubled
    #[arg(long, value_name = "TEMPLATE", conflicts_with = "text_column", help_heading = "Data")]
    prompt_template: Option<String>,

    /// Instead of a text column, chats for the checkpoint's chat template: lists of {role, content}, or their JSON
    #[arg(long, value_name = "COLUMN", conflicts_with_all = ["text_column", "prompt_template"], help_heading = "Data")]
    chat_column: Option<String>,

    /// System message for chats that have none
    #[arg(
        long,
        value_name = "TEXT",
        requires = "chat_column",
        conflicts_with = "prompt_template",
        help_heading = "Data"
    )]
    system: Option<String>,

    /// Keep only these input columns [default: all]
    #[arg(long, value_name = "A,B", value_delimiter = ',', help_heading = "Data")]
    keep: Option<Vec<String>>,

    /// Put this before the names of result columns
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true, help_heading = "Data")]
    prefix: String,

    /// Only rows that meet this SQL condition, such as "lang = 'en' AND length(text) > 20"
    #[schemars(rename = "where")]
    #[arg(long = "where", value_name = "SQL", help_heading = "Data")]
    filter: Option<String>,

    /// Only the first N rows, counted after --where
    #[schemars(range(min = 1))]
    #[arg(short = 'L', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Data")]
    limit: Option<u64>,

    /// Column that says what the result should be; the summary tells how well they agree
    #[arg(long, value_name = "COLUMN", help_heading = "Data")]
    truth_column: Option<String>,

    /// Checkpoint folder, or a hub id (org/name[@revision]) in the local Hugging Face cache
    #[arg(long, visible_alias = "model-id", value_name = "DIR|ID", value_hint = ValueHint::DirPath, help_heading = "Model")]
    model: String,

    /// Tokens of a text, special tokens included [default: the checkpoint's limit]
    #[schemars(range(min = 1))]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Model")]
    max_length: Option<u64>,

    /// What happens to a longer text [default: truncate-right; truncate-left for a continuation, chunk for tag]
    #[arg(long, value_enum, value_name = "HOW", help_heading = "Model")]
    overflow: Option<OverflowArg>,

    /// Tokens that neighbouring chunks share under --overflow chunk [default: 64, less where the limit is short]
    #[arg(long, value_name = "TOKENS", help_heading = "Model")]
    stride: Option<usize>,

    /// Precision of matrix products, on a GPU of activations too; sums, norms and logits are in f32 whatever it is
    #[arg(long, value_enum, value_name = "DTYPE", default_value = "auto", help_heading = "Model")]
    dtype: DtypeArg,

    /// Where to compute: several GPUs share the work. auto is the first GPU, if this build can use one and it answers
    #[arg(long, value_name = "auto|cpu|cuda:0[,cuda:1…]", default_value = "auto", help_heading = "Model")]
    #[schemars(with = "String")]
    device: DeviceChoice,

    /// Tokens of a batch, padding included; accepts 16k [default: 4096 on the CPU, 16384 on a GPU]
    #[arg(long, visible_alias = "max-num-batched-tokens", value_name = "TOKENS", value_parser = count, help_heading = "Running")]
    #[schemars(with = "Option<Count>")]
    max_batch_tokens: Option<u64>,

    /// Cut batches, windows and caches so that the run fits into so many bytes; accepts 512M and 2G [default: no limit]
    #[arg(long, value_name = "BYTES", value_parser = count, help_heading = "Running")]
    #[schemars(with = "Option<Count>")]
    memory_limit: Option<u64>,

    /// Rows of a unit, which is committed as a whole [default: 4096, more for very large inputs]
    #[schemars(range(min = 1))]
    #[arg(long, value_name = "ROWS", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Running")]
    unit_rows: Option<u64>,

    /// Threads to compute with [default: all cores]
    #[schemars(range(min = 1))]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Running")]
    threads: Option<u64>,

    /// Go on with an unfinished output of the same job
    #[arg(long, conflicts_with = "overwrite", help_heading = "Running")]
    resume: bool,

    /// Redo an output that an earlier run of this program wrote; other files are never deleted
    #[arg(long, help_heading = "Running")]
    overwrite: bool,

    /// Record failed rows in the error column, or stop at the first
    #[arg(long, value_enum, value_name = "WHAT", default_value = "record", help_heading = "Running")]
    on_error: OnErrorArg,

    /// Stop when more than N rows failed
    #[arg(long, value_name = "N", help_heading = "Running")]
    max_errors: Option<u64>,

    /// Compute N rows of a sample once more at the end, each alone, and tell how far that is from their results
    #[schemars(range(min = 1))]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Running")]
    audit: Option<u64>,

    /// Check everything and say what would be done; load no weights, write nothing
    #[arg(long, help_heading = "Running")]
    dry_run: bool,

    #[command(flatten)]
    #[schemars(flatten)]
    messages: MessageSettings,
}

#[derive(Debug, Clone, Copy, ValueEnum, JsonSchema)]
#[schemars(rename_all = "kebab-case")]
enum OverflowArg {
    /// Keep the end of the text
    TruncateLeft,
    /// Keep the beginning of the text
    TruncateRight,
    /// Cut it into overlapping chunks and join their results
    Chunk,
    /// Fail the row
    Error,
}

#[derive(Debug, Clone, Copy, ValueEnum, JsonSchema)]
#[schemars(rename_all = "kebab-case")]
enum DtypeArg {
    /// f32 on the CPU; on a GPU what most of the checkpoint is stored in
    Auto,
    F32,
    /// On the CPU: faster with AVX512-FP16, and less exact; very slow on others
    F16,
    /// On a GPU only
    Bf16,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum, JsonSchema)]
#[schemars(rename_all = "kebab-case")]
enum OnErrorArg {
    /// Record why in the error column and go on
    Record,
    /// Stop the run
    Fail,
}

/// The names of [`InputFormat`], for the job file's schema.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case")]
#[allow(dead_code)] // it stands for a type of a lower floor, which the flags parse
enum InputFormatName {
    Parquet,
    Arrow,
    Csv,
    Jsonl,
}

impl CommonSettings {
    pub(super) fn messages(&self) -> &MessageSettings {
        &self.messages
    }

    /// The job of these settings and a command's own.
    pub(super) fn into_job(self, command: CommandSpec) -> Job {
        Job {
            threads: self.threads,
            dry_run: self.dry_run,
            messages: self.messages.clone(),
            file: None,
            spec: self.into_spec(command),
        }
    }

    fn into_spec(self, command: CommandSpec) -> JobSpec {
        JobSpec {
            command,
            model: self.model,
            inputs: self.input,
            input_format: self.input_format,
            output: self.output,
            stores: Stores::default(),
            on_existing: match (self.resume, self.overwrite) {
                (true, _) => OnExisting::Resume,
                (_, true) => OnExisting::Overwrite,
                _ => OnExisting::Refuse,
            },
            prompt: match (self.chat_column, self.prompt_template) {
                (Some(column), _) => PromptSpec::Chat { column, system: self.system },
                (None, Some(template)) => PromptSpec::Template(template),
                (None, None) => PromptSpec::Column(self.text_column),
            },
            keep: self.keep.map(|keep| keep.into_iter().filter(|name| !name.is_empty()).collect()),
            prefix: self.prefix,
            filter: self.filter,
            limit: self.limit,
            truth_column: self.truth_column,
            max_length: self.max_length.map(|tokens| tokens as usize),
            overflow: self.overflow.map(|overflow| match overflow {
                OverflowArg::TruncateLeft => Overflow::TruncateLeft,
                OverflowArg::TruncateRight => Overflow::TruncateRight,
                OverflowArg::Chunk => Overflow::Chunk,
                OverflowArg::Error => Overflow::Error,
            }),
            stride: self.stride,
            device: self.device,
            dtype: match self.dtype {
                DtypeArg::Auto => ComputeDtype::Auto,
                DtypeArg::F32 => ComputeDtype::F32,
                DtypeArg::F16 => ComputeDtype::F16,
                DtypeArg::Bf16 => ComputeDtype::Bf16,
            },
            max_batch_tokens: self.max_batch_tokens.map(|tokens| tokens as usize),
            window_bytes: DEFAULT_WINDOW_BYTES,
            memory_limit: self.memory_limit,
            unit_rows: self.unit_rows,
            audit: self.audit,
            max_errors: if self.on_error == OnErrorArg::Fail { Some(0) } else { self.max_errors },
        }
    }
}
