//! Lineage of a run as [OpenLineage](https://openlineage.io) tells it: which datasets and which model made which output.
//!
//! A run has two events, `START` and one of `COMPLETE`, `FAIL` and `ABORT`, in version 2-0-2 of the specification. Datasets are
//! named as its naming conventions have it: `file` and the absolute path, or a bucket and the key in it.

use std::path::{Path, PathBuf};

use arrow::datatypes::{Schema, SchemaRef};
use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::plan::JobPlan;
use super::report::RunReport;
use super::spec::JobSpec;

const SPEC: &str = "https://openlineage.io/spec/2-0-2/OpenLineage.json";
const FACETS: &str = "https://openlineage.io/spec/facets";
/// The program as a package URL, which is the URI that the specification asks for.
const PRODUCER: &str = concat!("pkg:cargo/", env!("CARGO_PKG_NAME"), "@", env!("CARGO_PKG_VERSION"));
/// The namespace of jobs where `OPENLINEAGE_NAMESPACE` gives none.
const DEFAULT_NAMESPACE: &str = env!("CARGO_PKG_NAME");

/// A run whose events are told.
#[derive(Debug, Clone)]
pub struct LineageRun {
    run_id: Uuid,
    namespace: String,
    name: String,
    parent: Option<Parent>,
    inputs: Vec<Input>,
    models: Vec<DatasetName>,
    output: DatasetName,
}

/// The run that started this one, as Airflow's and dbt's integrations hand it on.
#[derive(Debug, Clone, PartialEq)]
struct Parent {
    namespace: String,
    name: String,
    run_id: Uuid,
}

/// A dataset's name, which is the same in every event.
#[derive(Debug, Clone, PartialEq, Eq)]
struct DatasetName {
    namespace: String,
    name: String,
}

/// What one `--input` names.
#[derive(Debug, Clone)]
struct Input {
    name: DatasetName,
    /// What the paths of its files begin with.
    base: PathBuf,
}

/// What planning a run found out about its data.
#[derive(Debug, Clone)]
pub struct PlannedData {
    files: Vec<PlannedFile>,
    input_schema: SchemaRef,
    output_schema: SchemaRef,
    /// The first columns of the output, which are the input's.
    kept_columns: usize,
    prompt_columns: Vec<String>,
    filter_columns: Vec<String>,
}

#[derive(Debug, Clone)]
struct PlannedFile {
    path: PathBuf,
    size_bytes: u64,
    /// Rows that the job reads of it.
    rows: u64,
}

/// Bytes and files of a finished output.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OutputSize {
    pub files: u64,
    pub bytes: u64,
}

/// What the environment says of a run, by the names that OpenLineage's own clients read.
#[derive(Debug, Clone, Default)]
pub struct LineageEnvironment {
    /// `OPENLINEAGE_NAMESPACE`: the namespace of jobs.
    pub namespace: Option<String>,
    /// `OPENLINEAGE_PARENT_ID`: namespace/name/run id of the run that started this one.
    pub parent_id: Option<String>,
}

impl LineageEnvironment {
    /// As this process has it.
    pub fn of_process() -> Self {
        let get = |name| std::env::var(name).ok().filter(|value: &String| !value.is_empty());
        Self { namespace: get("OPENLINEAGE_NAMESPACE"), parent_id: get("OPENLINEAGE_PARENT_ID") }
    }
}

impl PlannedData {
    /// What `plan` knows of the data.
    pub fn new(plan: &JobPlan) -> Self {
        let mut rows = vec![0; plan.dataset.files.len()];
        for unit in &plan.units {
            rows[unit.file] += unit.rows.end - unit.rows.start;
        }
        let files = plan.dataset.files.iter().zip(rows).map(|(file, rows)| PlannedFile {
            path: file.path.clone(),
            size_bytes: file.size_bytes,
            rows,
        });
        Self {
            files: files.collect(),
            input_schema: plan.dataset.schema.clone(),
            output_schema: plan.output_schema.clone(),
            kept_columns: plan.kept.len(),
            prompt_columns: plan.prompts.columns().into_iter().map(str::to_owned).collect(),
            filter_columns: plan.filter.iter().flat_map(|filter| filter.columns()).collect(),
        }
    }
}

impl LineageRun {
    /// A run of the job `name` over datasets and models, before anything is known but what they are called.
    ///
    /// A parent that cannot be read is told and left out.
    pub fn new(
        name: &str,
        inputs: &[String],
        models: &[String],
        output: &Path,
        environment: LineageEnvironment,
    ) -> Self {
        let parent = environment.parent_id.as_deref().and_then(|id| {
            let parent = Parent::parse(id);
            if parent.is_none() {
                tracing::warn!("OPENLINEAGE_PARENT_ID '{id}' is no NAMESPACE/JOB/RUN-UUID; events go without a parent");
            }
            parent
        });
        let mut named: Vec<Input> = Vec::new();
        for input in inputs.iter().map(|input| Input::new(input)) {
            if !named.iter().any(|other| other.name == input.name) {
                named.push(input);
            }
        }
        let mut named_models: Vec<DatasetName> = Vec::new();
        for model in models.iter().map(|model| DatasetName::of_model(model)) {
            if !named_models.contains(&model) {
                named_models.push(model);
            }
        }
        Self {
            run_id: Uuid::new_v4(),
            namespace: environment.namespace.unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned()),
            name: name.to_owned(),
            parent,
            inputs: named,
            models: named_models,
            output: DatasetName::new(&output.to_string_lossy()),
        }
    }

    /// A run of the job `name` as `spec` asks for it.
    pub fn of_job(name: &str, spec: &JobSpec, environment: LineageEnvironment) -> Self {
        Self::new(name, &spec.inputs, std::slice::from_ref(&spec.model), &spec.output, environment)
    }

    /// The event of the run's beginning.
    pub fn start(&self, at: DateTime<Utc>) -> Value {
        self.event("START", at, Map::new(), None, None)
    }

    /// The event of a job's end: `report` tells how it went, `size` how large a finished output is.
    pub fn end(&self, at: DateTime<Utc>, report: &RunReport, size: Option<OutputSize>) -> Value {
        let told = serde_json::to_value(report).unwrap_or_default();
        let rows = report
            .details
            .as_ref()
            .map(|details| details.rows_out)
            .or_else(|| report.finished_earlier.as_ref().and_then(|earlier| earlier["rows_out"].as_u64()));
        let statistics = size.map(|size| (size, rows));
        self.event(event_type(report.status), at, run_facets(&told), report.planned.as_ref(), statistics)
    }

    /// The event of the end of what is no single job; `report` is its report as JSON, with `status` and `error`.
    pub fn end_with(&self, at: DateTime<Utc>, report: &Value) -> Value {
        let status = report["status"].as_str().unwrap_or_default();
        self.event(event_type(status), at, run_facets(report), None, None)
    }

    fn event(
        &self,
        event_type: &str,
        at: DateTime<Utc>,
        mut run_facets: Map<String, Value>,
        planned: Option<&PlannedData>,
        size: Option<(OutputSize, Option<u64>)>,
    ) -> Value {
        let engine = json!({ "version": env!("CARGO_PKG_VERSION"), "name": env!("CARGO_PKG_NAME") });
        run_facets.insert("processing_engine".into(), facet("1-1-1/ProcessingEngineRunFacet", engine));
        if let Some(parent) = &self.parent {
            let parent = json!({
                "run": { "runId": parent.run_id.to_string() },
                "job": { "namespace": parent.namespace, "name": parent.name },
            });
            run_facets.insert("parent".into(), facet("1-2-0/ParentRunFacet", parent));
        }
        let job_type = json!({ "processingType": "BATCH", "integration": "MISTRAL_BATCH", "jobType": "COMMAND" });
        let models = self.models.iter().map(|model| {
            let kind = facet("1-0-1/DatasetTypeDatasetFacet", json!({ "datasetType": "MODEL" }));
            json!({ "namespace": model.namespace, "name": model.name, "facets": { "datasetType": kind } })
        });
        json!({
            "eventType": event_type,
            "eventTime": at.to_rfc3339_opts(SecondsFormat::Millis, true),
            "run": { "runId": self.run_id.to_string(), "facets": run_facets },
            "job": {
                "namespace": self.namespace,
                "name": self.name,
                "facets": { "jobType": facet("2-0-4/JobTypeJobFacet", job_type) },
            },
            "inputs": self.inputs.iter().map(|input| input.told(planned)).chain(models).collect::<Vec<_>>(),
            "outputs": [self.output_told(planned, size)],
            "producer": PRODUCER,
            "schemaURL": format!("{SPEC}#/$defs/RunEvent"),
        })
    }

    fn output_told(&self, planned: Option<&PlannedData>, size: Option<(OutputSize, Option<u64>)>) -> Value {
        let mut told = json!({ "namespace": self.output.namespace, "name": self.output.name });
        if let Some(planned) = planned {
            told["facets"] = json!({
                "schema": schema_facet(&planned.output_schema),
                "columnLineage": self.column_lineage(planned),
            });
        }
        if let Some((size, rows)) = size {
            let mut statistics = json!({ "size": size.bytes, "fileCount": size.files });
            if let Some(rows) = rows {
                statistics["rowCount"] = rows.into();
            }
            let statistics = facet("1-0-2/OutputStatisticsOutputDatasetFacet", statistics);
            told["outputFacets"] = json!({ "outputStatistics": statistics });
        }
        told
    }

    /// Which input columns each output column is made of: kept ones of themselves, results of what is in the prompt.
    fn column_lineage(&self, planned: &PlannedData) -> Value {
        let fields_of = |columns: &[String], kind: &str, subtype: &str| -> Vec<Value> {
            let of = |input: &Input, column: &String| {
                json!({
                    "namespace": input.name.namespace,
                    "name": input.name.name,
                    "field": column,
                    "transformations": [{ "type": kind, "subtype": subtype }],
                })
            };
            self.inputs.iter().flat_map(|input| columns.iter().map(move |column| of(input, column))).collect()
        };
        let mut fields = Map::new();
        for (place, field) in planned.output_schema.fields().iter().enumerate() {
            let made_of = if place < planned.kept_columns {
                fields_of(std::slice::from_ref(field.name()), "DIRECT", "IDENTITY")
            } else {
                fields_of(&planned.prompt_columns, "DIRECT", "TRANSFORMATION")
            };
            fields.insert(field.name().clone(), json!({ "inputFields": made_of }));
        }
        let filter = fields_of(&planned.filter_columns, "INDIRECT", "FILTER");
        facet("1-2-0/ColumnLineageDatasetFacet", json!({ "fields": fields, "dataset": filter }))
    }
}

impl Input {
    /// A folder or a file by its path; of a glob the folder that it looks in.
    fn new(input: &str) -> Self {
        let is_glob = input.contains(['*', '?', '[']) && !Path::new(input).exists();
        let base = if is_glob {
            let parts =
                input.split('/').take_while(|part| !part.contains(['*', '?', '['])).collect::<Vec<_>>().join("/");
            match (parts.is_empty(), input.starts_with('/')) {
                (true, true) => "/".to_owned(),
                (true, false) => ".".to_owned(),
                _ => parts,
            }
        } else {
            input.to_owned()
        };
        let name = DatasetName::new(&base);
        // Files below the working folder are found by their own names.
        Self { name, base: if base == "." { PathBuf::new() } else { PathBuf::from(base) } }
    }

    fn told(&self, planned: Option<&PlannedData>) -> Value {
        let mut told = json!({ "namespace": self.name.namespace, "name": self.name.name });
        if let Some(planned) = planned {
            told["facets"] = json!({ "schema": schema_facet(&planned.input_schema) });
            let files: Vec<&PlannedFile> =
                planned.files.iter().filter(|file| file.path.starts_with(&self.base)).collect();
            let statistics = json!({
                "rowCount": files.iter().map(|file| file.rows).sum::<u64>(),
                "size": files.iter().map(|file| file.size_bytes).sum::<u64>(),
                "fileCount": files.len(),
            });
            let statistics = facet("1-0-0/InputStatisticsInputDatasetFacet", statistics);
            told["inputFacets"] = json!({ "inputStatistics": statistics });
        }
        told
    }
}

impl DatasetName {
    /// A file or folder by its absolute path, an object by its bucket and key.
    fn new(place: &str) -> Self {
        let Some((scheme, rest)) = place.split_once("://") else {
            return Self {
                namespace: "file".to_owned(),
                name: absolute(Path::new(place)).to_string_lossy().into_owned(),
            };
        };
        let (authority, key) = rest.split_once('/').unwrap_or((rest, ""));
        let name = key.trim_end_matches('/');
        Self {
            namespace: format!("{scheme}://{authority}"),
            name: if name.is_empty() { "/".to_owned() } else { name.to_owned() },
        }
    }

    /// A checkpoint's folder, or its name on the hub.
    fn of_model(model: &str) -> Self {
        let is_id = !Path::new(model).exists() && !model.starts_with(['.', '/']) && model.split('/').count() == 2;
        match is_id {
            true => Self { namespace: "https://huggingface.co".to_owned(), name: model.to_owned() },
            false => Self::new(model),
        }
    }
}

impl Parent {
    fn parse(id: &str) -> Option<Self> {
        let (rest, run_id) = id.rsplit_once('/')?;
        let (namespace, name) = rest.rsplit_once('/')?;
        let run_id = Uuid::parse_str(run_id).ok()?;
        Some(Self { namespace: namespace.to_owned(), name: name.to_owned(), run_id })
    }
}

/// How the specification calls an end.
fn event_type(status: &str) -> &'static str {
    match status {
        "done" | "nothing_to_do" => "COMPLETE",
        "stopped" => "ABORT",
        _ => "FAIL",
    }
}

/// The run's own report, and its error where it has one.
fn run_facets(report: &Value) -> Map<String, Value> {
    let mut facets = Map::new();
    if let Some(message) = report["error"].as_str() {
        let error = json!({ "message": message, "programmingLanguage": "Rust" });
        facets.insert("errorMessage".into(), facet("1-0-1/ErrorMessageRunFacet", error));
    }
    let mut told = report.clone();
    told["_producer"] = PRODUCER.into();
    // A facet of our own: the specification has no narrower schema for it.
    told["_schemaURL"] = format!("{SPEC}#/$defs/RunFacet").into();
    facets.insert("mistralBatch_report".into(), told);
    facets
}

/// A facet of the specification, by version and name.
fn facet(schema: &str, mut content: Value) -> Value {
    let name = schema.rsplit('/').next().unwrap_or(schema);
    content["_producer"] = PRODUCER.into();
    content["_schemaURL"] = format!("{FACETS}/{schema}.json#/$defs/{name}").into();
    content
}

fn schema_facet(schema: &Schema) -> Value {
    let field = |field: &std::sync::Arc<arrow::datatypes::Field>| json!({ "name": field.name(), "type": field.data_type().to_string() });
    facet("1-2-0/SchemaDatasetFacet", json!({ "fields": schema.fields().iter().map(field).collect::<Vec<_>>() }))
}

/// A path from the root on, without `.` and `..` where the folders that they stand for are there.
fn absolute(path: &Path) -> PathBuf {
    let whole = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    if !whole.components().any(|part| part == std::path::Component::ParentDir) {
        // As the user wrote it, links and all; without the slash at a folder's end.
        return whole.components().collect();
    }
    whole
        .ancestors()
        .find_map(|folder| Some(folder.canonicalize().ok()?.join(whole.strip_prefix(folder).ok()?)))
        .unwrap_or(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(place: &str) -> (String, String) {
        let DatasetName { namespace, name } = DatasetName::new(place);
        (namespace, name)
    }

    #[test]
    fn datasets_have_the_names_of_the_naming_conventions() {
        let file = |path: &str| ("file".to_owned(), path.to_owned());
        assert_eq!(name("/data/in.parquet"), file("/data/in.parquet"));
        assert_eq!(name("/data/"), file("/data"));
        assert_eq!(name("/usr/../usr/nowhere/x"), file("/usr/nowhere/x"));
        let here = std::env::current_dir().unwrap();
        assert_eq!(name("./out"), file(here.join("out").to_str().unwrap()));
        assert_eq!(name("s3://bucket/a/b.parquet"), ("s3://bucket".to_owned(), "a/b.parquet".to_owned()));
        assert_eq!(name("gs://bucket"), ("gs://bucket".to_owned(), "/".to_owned()));
        assert_eq!(Input::new("/logs/2026/*/x-?.jsonl").name.name, "/logs/2026");
        assert_eq!(Input::new("*.csv").name.name, here.to_str().unwrap());
        assert_eq!(Input::new("s3://bucket/logs/*.csv").name.name, "logs");
        assert_eq!(DatasetName::of_model("mistralai/nowhere").namespace, "https://huggingface.co");
        assert_eq!(DatasetName::of_model("./nowhere").namespace, "file");
    }

    #[test]
    fn a_parent_is_read_as_airflow_writes_it() {
        let id = "01941f29-7c00-7087-8906-40e512c257bd";
        let parent = Parent::parse(&format!("airflow://host/dag.task/{id}")).unwrap();
        assert_eq!((&parent.namespace[..], &parent.name[..]), ("airflow://host", "dag.task"));
        assert_eq!(parent.run_id.to_string(), id);
        assert_eq!(Parent::parse("namespace/job/no-uuid"), None);
        assert_eq!(Parent::parse(id), None);
    }

    #[test]
    fn an_end_has_the_start_s_run_and_its_own_type() {
        let run = LineageRun::new(
            "job",
            &["a".into(), "a".into()],
            &["m".into()],
            Path::new("b"),
            LineageEnvironment::default(),
        );
        let start = run.start(Utc::now());
        assert_eq!(start["inputs"].as_array().unwrap().len(), 2, "a dataset that is named twice, and the model");
        for (status, event_type) in
            [("done", "COMPLETE"), ("nothing_to_do", "COMPLETE"), ("stopped", "ABORT"), ("failed", "FAIL")]
        {
            let end = run.end_with(Utc::now(), &json!({ "status": status, "error": "why" }));
            assert_eq!(end["eventType"], event_type);
            assert_eq!(end["run"]["runId"], start["run"]["runId"]);
            assert_eq!(end["run"]["facets"]["errorMessage"]["message"], "why");
        }
    }
}
