//! Sessions over the sample data and the golden checkpoints, and what their queries computed.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StringArray};
use arrow::compute::concat_batches;
use datafusion::dataframe::DataFrame;
use datafusion::error::DataFusionError;
use datafusion::execution::TaskContext;
use datafusion::physical_plan::metrics::MetricValue;
use datafusion::physical_plan::{ExecutionPlan, collect, displayable};
use datafusion::prelude::{SessionConfig, SessionContext};
use mistral_batch::sql::{self, ModelRegistry, RegistryOptions};

pub fn project(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path).to_str().unwrap().to_owned()
}

/// The models of the tests: the sample data's and two of the goldens'.
pub fn models() -> Arc<ModelRegistry> {
    let models = ModelRegistry::new(RegistryOptions::default());
    for (name, path) in [
        ("tickets", "sample-data/models/ticket-classifier"),
        ("pii", "sample-data/models/pii-tagger"),
        ("sorter", "sample-data/models/digit-sorter"),
        ("value", "tests/goldens/checkpoints/cls-regression-f16"),
        ("embedder", "tests/goldens/checkpoints/embedder"),
    ] {
        models.add(name, &project(path)).unwrap();
    }
    Arc::new(models)
}

pub async fn session_with(config: SessionConfig, models: Arc<ModelRegistry>) -> SessionContext {
    let context = SessionContext::new_with_config(config);
    sql::register(&context, models).unwrap();
    for (name, file) in [
        ("tickets", "tickets"),
        ("tickets_expected", "tickets-expected"),
        ("pii", "pii"),
        ("pii_expected", "pii-expected"),
        ("sorting", "sorting"),
    ] {
        let path = project(&format!("sample-data/{file}.parquet"));
        context.register_parquet(name, path, Default::default()).await.unwrap();
    }
    context
}

/// A session with one partition, so that plans are the same everywhere.
pub async fn session() -> SessionContext {
    session_with(SessionConfig::new().with_target_partitions(1), models()).await
}

/// A table of texts; `None` is null.
pub fn add_texts(context: &SessionContext, name: &str, texts: &[Option<&str>]) {
    let ids: ArrayRef = Arc::new((0..texts.len() as i64).collect::<arrow::array::Int64Array>());
    let texts: ArrayRef = Arc::new(texts.iter().copied().collect::<StringArray>());
    let batch = RecordBatch::try_from_iter_with_nullable([("id", ids, false), ("text", texts, true)]).unwrap();
    context.register_batch(name, batch).unwrap();
}

/// A query's rows and what it took.
pub struct Answer {
    pub rows: RecordBatch,
    pub plan: Arc<dyn ExecutionPlan>,
}

/// Runs a query to its end.
#[track_caller]
pub fn ask(runtime: &tokio::runtime::Runtime, context: &SessionContext, query: &str) -> Answer {
    runtime.block_on(async {
        let frame = sql::query(context, query).await.unwrap_or_else(|error| panic!("{query}: {error}"));
        answer(frame).await.unwrap_or_else(|error| panic!("{query}: {error}"))
    })
}

pub async fn answer(frame: DataFrame) -> Result<Answer, DataFusionError> {
    let context: Arc<TaskContext> = frame.task_ctx().into();
    let plan = frame.create_physical_plan().await?;
    let batches = collect(plan.clone(), context).await?;
    let rows = concat_batches(&plan.schema(), &batches)?;
    Ok(Answer { rows, plan })
}

/// Why a query cannot be planned or run.
#[track_caller]
pub fn refusal(runtime: &tokio::runtime::Runtime, context: &SessionContext, query: &str) -> String {
    let error = runtime.block_on(async {
        match sql::query(context, query).await {
            Ok(frame) => answer(frame).await.map(|_| ()).err(),
            Err(error) => Some(error),
        }
    });
    error.unwrap_or_else(|| panic!("{query} went well")).strip_backtrace()
}

impl Answer {
    /// A metric of all operators that compute, added up.
    pub fn metric(&self, name: &str) -> usize {
        self.metrics(name).iter().sum()
    }

    /// A metric of each operator that computes, from the top of the plan down.
    pub fn metrics(&self, name: &str) -> Vec<usize> {
        let mut found = Vec::new();
        visit(&self.plan, &mut |plan| {
            if plan.name() == "InferExec" {
                let metrics = plan.metrics().unwrap();
                let value = |value: MetricValue| match value {
                    MetricValue::Ratio { ratio_metrics, .. } => ratio_metrics.total(),
                    value => value.as_usize(),
                };
                found.push(metrics.sum(|metric| metric.value().name() == name).map_or(0, value));
            }
        });
        found
    }

    pub fn rows_inferred(&self) -> usize {
        self.metric("rows_inferred")
    }

    /// How many operators of this name the plan has.
    pub fn operators(&self, name: &str) -> usize {
        let mut count = 0;
        visit(&self.plan, &mut |plan| count += usize::from(plan.name() == name));
        count
    }

    pub fn shown(&self) -> String {
        displayable(&*self.plan).indent(false).to_string()
    }

    /// A column of texts.
    pub fn texts(&self, column: usize) -> Vec<Option<String>> {
        let texts = arrow::compute::cast(self.rows.column(column), &arrow::datatypes::DataType::Utf8).unwrap();
        let texts = texts.as_string::<i32>();
        (0..texts.len()).map(|row| texts.is_valid(row).then(|| texts.value(row).to_owned())).collect()
    }
}

fn visit(plan: &Arc<dyn ExecutionPlan>, f: &mut impl FnMut(&Arc<dyn ExecutionPlan>)) {
    f(plan);
    plan.children().into_iter().for_each(|child| visit(child, f));
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}
