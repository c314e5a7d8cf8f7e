//! Everything about a job that is known before a weight is read: its rows, its units, its columns, its fingerprint.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use arrow::datatypes::{Field, Schema, SchemaRef};
use serde_json::{Value, json};

use super::devices::Devices;
use super::prompts::PromptSource;
use super::row_params::RowParams;
use super::spec::JobSpec;
use super::truth::TruthKind;
use crate::data::dataset::{Dataset, DatasetOptions};
use crate::data::filter::RowFilter;
use crate::data::plan_file::PlanFile;
use crate::data::source::{WindowOptions, WindowReader};
use crate::data::units::{Unit, cut_units, unit_rows};
use crate::engine::common_fields;
use crate::error::{Error, Result};
use crate::model::Checkpoint;
use crate::text::{Overflow, TextTokenizer};

/// Rows of a packing window: enough for batches of equal length, few enough to hold.
const WINDOW_ROWS: usize = 4096;

/// A job that was checked against its data and its checkpoint.
pub struct JobPlan {
    pub dataset: Arc<Dataset>,
    pub units: Vec<Unit>,
    /// Input columns that are kept, then the result columns.
    pub output_schema: SchemaRef,
    /// Input columns that are kept, by name.
    pub kept: Vec<String>,
    pub filter: Option<RowFilter>,
    pub truth: Option<TruthKind>,
    pub prompts: PromptSource,
    /// Settings that rows bring themselves.
    pub row_params: Option<RowParams>,
    /// What is persisted beside the parts.
    pub file: PlanFile,
    /// What each part's footer says of the model.
    pub footer: BTreeMap<String, String>,
    /// Columns to read: kept ones, those of the prompts, and what filter and truth need.
    projection: Vec<String>,
    window_bytes: usize,
}

impl JobPlan {
    /// Checks `spec` against its data and its checkpoint, and cuts the data into units.
    ///
    /// # Errors
    /// Everything that can be told without computing: see the variants of [`Error`].
    pub fn new(
        spec: &JobSpec,
        checkpoint: &Checkpoint,
        tokenizer: &TextTokenizer,
        max_length: usize,
        devices: &Devices,
    ) -> Result<Self> {
        let mut dataset = Dataset::open(&DatasetOptions {
            inputs: spec.inputs.clone(),
            format: spec.input_format,
            text_columns: spec.text_columns().into_iter().map(str::to_owned).collect(),
            stores: spec.stores.clone(),
        })?;
        dataset.limit_reads(spec.window_bytes);
        let dataset = Arc::new(dataset);
        let first_path = dataset.files.first().map(|file| file.path.clone()).unwrap_or_default();
        let prompts = PromptSource::new(spec, &dataset, tokenizer)?;
        let row_params = spec.command.row_params(checkpoint, tokenizer, &dataset)?;

        let results: Vec<Field> = spec.command.fields(checkpoint)?.into_iter().chain(common_fields()).collect();
        let kept = kept_columns(&dataset, spec.keep.as_deref())?;
        let output_schema = output_schema(&dataset, &kept, &results, &spec.prefix)?;
        let truth = truth_kind(spec, checkpoint, &dataset, &first_path)?;

        let filter = spec.filter.as_deref().map(|sql| RowFilter::compile(sql, &dataset.schema)).transpose()?;
        let mut needed: Vec<String> = kept.clone();
        needed.extend(prompts.columns().into_iter().map(str::to_owned));
        needed.extend(row_params.iter().map(|params| params.column().to_owned()));
        needed.extend(spec.truth_column.clone());
        needed.extend(filter.iter().flat_map(RowFilter::columns));
        let projection: Vec<String> =
            dataset.schema.fields().iter().map(|f| f.name().clone()).filter(|name| needed.contains(name)).collect();
        // Planned once more for the columns that are read, because it finds them by place.
        let filter = filter.map(|filter| filter.for_schema(&project(&dataset.schema, &projection))).transpose()?;

        let limit = match (&filter, spec.limit) {
            (Some(filter), Some(limit)) => Some(rows_until(&dataset, filter, limit, spec.window_bytes)?),
            (_, limit) => limit,
        };
        let file_rows: Vec<u64> = dataset.files.iter().map(|file| file.rows).collect();
        let total = dataset.total_rows().min(limit.unwrap_or(u64::MAX));
        let unit_rows = unit_rows(total, spec.unit_rows);
        let units = cut_units(&file_rows, unit_rows, limit);
        let planned_rows = units.iter().map(|unit| unit.rows.end - unit.rows.start).sum();

        let identity = checkpoint.identity();
        let dtype = checkpoint.compute_dtype(devices.first())?.as_str();
        let mut settings = json!({
            "command": spec.command.name(),
            "options": spec.command.settings(checkpoint)?,
            "checkpoint": to_json(&identity)?,
            "tokenizer_sha256": tokenizer.sha256(),
            "dtype": dtype,
            "prompt": prompts.settings(),
            "max_length": max_length,
            "overflow": to_json(&spec.overflow())?,
            "stride": (spec.overflow() == Overflow::Chunk).then(|| spec.stride(max_length)),
            "where": spec.filter,
            "limit": spec.limit,
            "truth_column": spec.truth_column,
            "output_schema": output_schema.fields().iter().map(|f| format!("{}: {}", f.name(), f.data_type())).collect::<Vec<_>>(),
        });
        if devices.are_cuda() {
            // Another device sums in another order; which of its kind it is changes as little as another CPU.
            settings["device"] = devices.kind().into();
        }
        let batch_tokens = spec.batch_tokens(devices);
        let notes =
            json!({ "model": checkpoint.name, "max_batch_tokens": batch_tokens, "window_bytes": spec.window_bytes });
        let stamps: Vec<_> = dataset.files.iter().map(|file| file.stamp()).collect();
        let file = PlanFile::new(settings, notes, to_json(&stamps)?, unit_rows, units.len() as u64, planned_rows);
        let window = checkpoint.config.sliding_window.map_or("none".to_owned(), |window| window.to_string());
        let footer = BTreeMap::from([
            ("model".to_owned(), checkpoint.name.clone()),
            ("config_sha256".to_owned(), identity.config_sha256),
            ("weights_sha256".to_owned(), identity.weights_sha256),
            ("tokenizer_sha256".to_owned(), tokenizer.sha256().to_owned()),
            ("dtype".to_owned(), dtype.to_owned()),
            ("device".to_owned(), devices.kind().to_owned()),
            ("sliding_window".to_owned(), window),
            ("version".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
        ]);
        let window_bytes = spec.window_bytes;
        Ok(Self {
            dataset,
            units,
            output_schema,
            kept,
            filter,
            truth,
            prompts,
            row_params,
            file,
            footer,
            projection,
            window_bytes,
        })
    }

    /// What was planned, in words.
    pub fn describe(&self, checkpoint: &Checkpoint, spec: &JobSpec, devices: &Devices) -> Vec<String> {
        let config = &checkpoint.config;
        let window = config.sliding_window.map_or("no window".to_owned(), |window| format!("window {window}"));
        vec![
            format!(
                "{}: {}, {window}, {} on {}",
                checkpoint.dir.display(),
                config.architecture.class_name(),
                self.footer.get("dtype").map_or("f32", String::as_str),
                devices.describe()
            ),
            format!("{} rows in {} file(s)", self.dataset.total_rows(), self.dataset.files.len()),
            format!(
                "{} rows planned in {} unit(s) of {}, batches of at most {} tokens",
                self.file.rows,
                self.units.len(),
                self.file.unit_rows,
                spec.batch_tokens(devices)
            ),
        ]
    }

    /// A reader over the given units' packing windows.
    ///
    /// # Errors
    /// When a column of the projection is not there.
    pub fn windows(&self, units: Vec<Unit>) -> Result<WindowReader> {
        let options = WindowOptions {
            projection: Some(self.projection.clone()),
            window_rows: WINDOW_ROWS,
            window_bytes: self.window_bytes,
        };
        WindowReader::new(self.dataset.clone(), units, options)
    }
}

fn to_json(value: &impl serde::Serialize) -> Result<Value> {
    serde_json::to_value(value).map_err(|error| Error::Internal(error.to_string()))
}

fn kept_columns(dataset: &Dataset, keep: Option<&[String]>) -> Result<Vec<String>> {
    let all = || dataset.schema.fields().iter().map(|field| field.name().clone());
    let Some(keep) = keep else { return Ok(all().collect()) };
    for name in keep {
        dataset.column(name, "--keep")?;
    }
    Ok(all().filter(|name| keep.contains(name)).collect())
}

fn output_schema(dataset: &Dataset, kept: &[String], results: &[Field], prefix: &str) -> Result<SchemaRef> {
    let mut fields: Vec<Arc<Field>> =
        dataset.schema.fields().iter().filter(|field| kept.contains(field.name())).cloned().collect();
    for field in results {
        let field = field.clone().with_name(format!("{prefix}{}", field.name()));
        if kept.contains(field.name()) {
            return Err(Error::ColumnCollision { column: field.name().clone() });
        }
        fields.push(Arc::new(field));
    }
    Ok(Arc::new(Schema::new(fields)))
}

fn truth_kind(spec: &JobSpec, checkpoint: &Checkpoint, dataset: &Dataset, path: &Path) -> Result<Option<TruthKind>> {
    let Some(column) = spec.truth_column.as_deref() else { return Ok(None) };
    let field = dataset.column(column, "--truth-column")?;
    spec.command.truth(checkpoint, column, field.data_type(), path).map(Some)
}

fn project(schema: &Schema, projection: &[String]) -> Schema {
    Schema::new(schema.fields().iter().filter(|f| projection.contains(f.name())).cloned().collect::<Vec<_>>())
}

/// How many rows of the dataset must be read until `limit` of them passed the filter.
///
/// Read at plan time, so that the plan holds only units that the job needs.
fn rows_until(dataset: &Arc<Dataset>, filter: &RowFilter, limit: u64, window_bytes: usize) -> Result<u64> {
    let columns = filter.columns();
    // The filter was planned for more columns; plan it again for its own.
    let filter = filter.for_schema(&project(&dataset.schema, &columns))?;
    let file_rows: Vec<u64> = dataset.files.iter().map(|file| file.rows).collect();
    let options = WindowOptions { projection: Some(columns), window_rows: WINDOW_ROWS, window_bytes };
    let units = cut_units(&file_rows, unit_rows(dataset.total_rows(), None), None);
    let (mut read, mut passed) = (0, 0);
    for window in WindowReader::new(dataset.clone(), units, options)? {
        let batch = window?.batch;
        let passing = filter.passing(&batch)?;
        let count = passing.true_count() as u64;
        if passed + count >= limit {
            let last = passing.values().set_indices().nth((limit - passed).saturating_sub(1) as usize);
            return Ok(if limit == passed { read } else { read + last.map_or(0, |index| index as u64 + 1) });
        }
        passed += count;
        read += batch.num_rows() as u64;
    }
    Ok(read)
}
