//! The physical operator: its input's rows in their order, with one more column that a model computes.
//!
//! Rows are buffered over many record batches up to a window (`mistral.window_rows`, or fewer where texts are long), so that
//! texts of like length share batches. While a window is computed the next one is read and tokenized. Rows without a text
//! take no place in a window. What is buffered is reserved in the query's memory pool.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, RecordBatch};
use arrow::datatypes::{Field, Schema, SchemaRef};
use datafusion::common::stats::{ColumnStatistics, Precision};
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{Statistics, internal_err};
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::memory_pool::{MemoryConsumer, MemoryReservation};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::{EquivalenceProperties, PhysicalExpr};
use datafusion::physical_plan::execution_plan::{
    CardinalityEffect, ChildrenPropertiesMode, EmissionType, ReplaceChildrenOptions,
};
use datafusion::physical_plan::metrics::{
    BaselineMetrics, Count, ExecutionPlanMetricsSet, MetricBuilder, MetricsSet, RatioMetrics, RecordOutput, Time,
};
use datafusion::physical_plan::statistics::{ChildStats, StatisticsArgs};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, Distribution, ExecutionPlan, ExecutionPlanProperties, PlanProperties,
};
use futures::{StreamExt, TryStreamExt, stream};

use super::call::ModelCall;
use super::node::InferNode;
use super::settings::SqlSettings;
use super::worker::{PendingResult, Work, Worker};
use crate::data::text_column::payload_bytes;

/// Bytes of texts in a window, as in the commands.
const WINDOW_BYTES: usize = 64 << 20;
/// Windows under way: one is computed, one is ready for it, one waits to be taken.
const WINDOWS_IN_FLIGHT: usize = 3;
/// Rows of the first window below a limit; later ones double.
const FIRST_ROWS_BELOW_LIMIT: usize = 64;
/// Rows without a text that a window may hold besides, for each one with a text.
const NULL_ROWS_PER_ROW: usize = 8;

/// The operator; see the module.
#[derive(Debug)]
pub struct InferExec {
    input: Arc<dyn ExecutionPlan>,
    call: Arc<ModelCall>,
    argument: Arc<dyn PhysicalExpr>,
    output: String,
    stops_early: bool,
    properties: Arc<PlanProperties>,
    metrics: ExecutionPlanMetricsSet,
}

/// What a partition of the operator has done.
#[derive(Debug, Clone)]
pub struct InferMetrics {
    /// Rows with a text, for which the model ran (or that failed before).
    pub rows_inferred: Count,
    /// Rows without a text.
    pub rows_null: Count,
    pub rows_failed: Count,
    pub tokens: Count,
    pub batches: Count,
    /// The share of padding in padded batches; it is dropped at the model's door.
    pub padding: RatioMetrics,
    /// Time in model and head.
    pub device_time: Time,
}

impl InferMetrics {
    fn new(metrics: &ExecutionPlanMetricsSet, partition: usize) -> Self {
        let counter = |name: &'static str| MetricBuilder::new(metrics).counter(name, partition);
        Self {
            rows_inferred: counter("rows_inferred"),
            rows_null: counter("rows_null"),
            rows_failed: counter("rows_failed"),
            tokens: counter("tokens"),
            batches: counter("batches"),
            padding: MetricBuilder::new(metrics).ratio_metrics("padding", partition),
            device_time: MetricBuilder::new(metrics).subset_time("device_time", partition),
        }
    }
}

impl InferExec {
    /// The operator of `node` over `input`.
    ///
    /// # Errors
    /// When the properties of the plan cannot be told.
    pub fn try_new(input: Arc<dyn ExecutionPlan>, node: &InferNode, argument: Arc<dyn PhysicalExpr>) -> Result<Self> {
        let (call, output) = (node.call().clone(), node.output().to_owned());
        let properties = Self::properties_over(&input, &call, &output)?;
        let metrics = ExecutionPlanMetricsSet::new();
        Ok(Self { input, call, argument, output, stops_early: node.stops_early(), properties, metrics })
    }

    fn properties_over(input: &Arc<dyn ExecutionPlan>, call: &ModelCall, output: &str) -> Result<Arc<PlanProperties>> {
        let input_schema = input.schema();
        let field = Arc::new(Field::new(output, call.return_type.clone(), true));
        let fields: Vec<_> = input_schema.fields().iter().cloned().chain([field]).collect();
        let schema = Arc::new(Schema::new_with_metadata(fields, input_schema.metadata().clone()));
        // The input's columns keep their places, so what is known of their order holds on.
        let mut equivalences = EquivalenceProperties::new(schema.clone());
        equivalences.add_orderings(input.equivalence_properties().oeq_class().iter().cloned());
        let partitioning = input.output_partitioning().clone();
        let boundedness = input.boundedness();
        Ok(Arc::new(PlanProperties::new(equivalences, partitioning, EmissionType::Incremental, boundedness)))
    }

    /// The call that it computes.
    pub fn call(&self) -> &ModelCall {
        &self.call
    }
}

impl DisplayAs for InferExec {
    fn fmt_as(&self, format: DisplayFormatType, f: &mut fmt::Formatter) -> fmt::Result {
        match format {
            DisplayFormatType::Default | DisplayFormatType::Verbose => {
                write!(f, "InferExec: {}, argument={}", self.call, self.argument)?;
                if self.stops_early {
                    write!(f, ", stops_early=true")?;
                }
                Ok(())
            }
            DisplayFormatType::TreeRender => writeln!(f, "{}", self.call),
        }
    }
}

impl ExecutionPlan for InferExec {
    fn name(&self) -> &str {
        "InferExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }

    fn required_input_distribution(&self) -> Vec<Distribution> {
        // Completions are best in flight together, and share one budget for their keys and values.
        match self.call.function.generates() {
            true => vec![Distribution::SinglePartition],
            false => vec![Distribution::UnspecifiedDistribution],
        }
    }

    fn benefits_from_input_partitioning(&self) -> Vec<bool> {
        vec![false] // one device
    }

    fn maintains_input_order(&self) -> Vec<bool> {
        vec![true]
    }

    fn supports_limit_pushdown(&self) -> bool {
        true
    }

    fn cardinality_effect(&self) -> CardinalityEffect {
        CardinalityEffect::Equal
    }

    fn child_stats_requests(&self, partition: Option<usize>) -> Vec<ChildStats> {
        vec![ChildStats::At(partition)]
    }

    fn statistics_from_inputs(&self, inputs: &[Arc<Statistics>], _: &StatisticsArgs) -> Result<Arc<Statistics>> {
        let [input] = inputs else { return internal_err!("InferExec has one input") };
        let mut statistics = Statistics::clone(input);
        statistics.total_byte_size = Precision::Absent;
        statistics.column_statistics.push(ColumnStatistics::new_unknown());
        Ok(Arc::new(statistics))
    }

    fn apply_expressions(
        &self,
        f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        f(&self.argument)
    }

    fn replace_children(
        self: Arc<Self>,
        mut children: Vec<Arc<dyn ExecutionPlan>>,
        _: ReplaceChildrenOptions,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let (Some(input), true) = (children.pop(), children.is_empty()) else {
            return internal_err!("InferExec has one input");
        };
        Ok(Arc::new(Self {
            properties: Self::properties_over(&input, &self.call, &self.output)?,
            input,
            call: self.call.clone(),
            argument: self.argument.clone(),
            output: self.output.clone(),
            stops_early: self.stops_early,
            metrics: ExecutionPlanMetricsSet::new(),
        }))
    }

    fn with_new_children(self: Arc<Self>, children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        self.replace_children(children, ReplaceChildrenOptions::new(ChildrenPropertiesMode::Recompute))
    }

    fn metrics(&self) -> Option<MetricsSet> {
        Some(self.metrics.clone_inner())
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let settings = SqlSettings::of(context.session_config().options())?;
        let work = Work::new(self.call.clone(), InferMetrics::new(&self.metrics, partition), settings.on_error);
        let window_rows = settings.window_rows;
        let windows = Windows {
            input: self.input.execute(partition, context.clone())?,
            argument: self.argument.clone(),
            schema: self.schema(),
            rest: None,
            input_ended: false,
            next_rows: if self.stops_early { window_rows.min(FIRST_ROWS_BELOW_LIMIT) } else { window_rows },
            most_rows: window_rows,
            // Below a limit nothing is computed that was not asked for.
            most_in_flight: if self.stops_early { 1 } else { WINDOWS_IN_FLIGHT },
            in_flight: VecDeque::new(),
            worker: None,
            work: CancelOnDrop(Arc::new(work)),
            baseline: BaselineMetrics::new(&self.metrics, partition),
            memory: MemoryConsumer::new(format!("InferExec[{partition}]")).register(context.memory_pool()),
        };
        let batches = stream::try_unfold(windows, |mut windows| async move {
            let batches = windows.next_results().await?;
            Ok::<_, DataFusionError>(batches.map(|batches| (stream::iter(batches).map(Ok), windows)))
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(self.schema(), batches.try_flatten())))
    }
}

/// Tells the worker when the stream is dropped.
struct CancelOnDrop(Arc<Work>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// A partition's rows on their way through the model.
struct Windows {
    input: SendableRecordBatchStream,
    argument: Arc<dyn PhysicalExpr>,
    schema: SchemaRef,
    /// What the last window left of a record batch.
    rest: Option<Piece>,
    input_ended: bool,
    /// Rows with a text that the next window may hold.
    next_rows: usize,
    most_rows: usize,
    most_in_flight: usize,
    in_flight: VecDeque<Window>,
    worker: Option<Worker>,
    work: CancelOnDrop,
    baseline: BaselineMetrics,
    memory: MemoryReservation,
}

/// Rows with their arguments.
struct Piece {
    rows: RecordBatch,
    arguments: ArrayRef,
}

/// Rows whose results are under way.
struct Window {
    pieces: Vec<RecordBatch>,
    result: PendingResult,
    bytes: usize,
}

impl Piece {
    fn slice(&self, offset: usize, len: usize) -> Self {
        Self { rows: self.rows.slice(offset, len), arguments: self.arguments.slice(offset, len) }
    }

    /// The bytes that its rows take, without what other slices of the same buffers take.
    fn memory_bytes(&self) -> usize {
        let bytes = |column: &ArrayRef| column.to_data().get_slice_memory_size().ok();
        self.rows.columns().iter().map(|column| bytes(column).unwrap_or_else(|| column.get_array_memory_size())).sum()
    }
}

impl Windows {
    /// The next window's rows with their results.
    async fn next_results(&mut self) -> Result<Option<Vec<RecordBatch>>> {
        while !self.input_ended && self.in_flight.len() < self.most_in_flight {
            match self.read_window().await? {
                Some((pieces, bytes)) => self.submit(pieces, bytes),
                None if self.rest.is_some() => break, // no memory for it now
                None => self.input_ended = true,
            }
        }
        let Some(Window { pieces, result, bytes }) = self.in_flight.pop_front() else { return Ok(None) };
        let results = result
            .join()
            .await
            .unwrap_or_else(|error| internal_err!("a task that computes a window failed: {error}"))?;
        self.memory.shrink(bytes);
        let mut offset = 0;
        let mut batches = Vec::with_capacity(pieces.len());
        for rows in pieces {
            let mut columns = rows.columns().to_vec();
            columns.push(results.slice(offset, rows.num_rows()));
            offset += rows.num_rows();
            batches.push(RecordBatch::try_new(self.schema.clone(), columns)?.record_output(&self.baseline));
        }
        Ok(Some(batches))
    }

    fn submit(&mut self, pieces: Vec<Piece>, bytes: usize) {
        let (rows, arguments) = pieces.into_iter().map(|piece| (piece.rows, piece.arguments)).unzip();
        let worker = self.worker.get_or_insert_with(|| Worker::start(self.work.0.clone()));
        self.in_flight.push_back(Window { pieces: rows, result: worker.submit(arguments), bytes });
    }

    /// Reads rows until there are enough of them.
    async fn read_window(&mut self) -> Result<Option<(Vec<Piece>, usize)>> {
        let mut pieces: Vec<Piece> = Vec::new();
        let (mut texts, mut rows, mut text_bytes, mut memory_bytes) = (0, 0, 0, 0);
        while texts < self.next_rows && rows < self.next_rows * NULL_ROWS_PER_ROW && text_bytes < WINDOW_BYTES {
            let piece = match self.rest.take() {
                Some(piece) => piece,
                None => match self.input.next().await.transpose()? {
                    Some(rows) => {
                        let arguments = self.argument.evaluate(&rows)?.into_array(rows.num_rows())?;
                        Piece { rows, arguments }
                    }
                    None => break,
                },
            };
            let len = piece.rows.num_rows();
            if len == 0 {
                continue;
            }
            let take = rows_with_texts(&piece.arguments, self.next_rows - texts);
            let take = take.min(self.next_rows * NULL_ROWS_PER_ROW - rows);
            let taken = piece.slice(0, take);
            let bytes = taken.memory_bytes();
            if let Err(error) = self.memory.try_grow(bytes) {
                // What is buffered can be computed and given on, which makes room.
                if pieces.is_empty() && self.in_flight.is_empty() {
                    return Err(error);
                }
                self.rest = Some(piece);
                break;
            }
            if take < len {
                self.rest = Some(piece.slice(take, len - take));
            }
            texts += taken.arguments.len() - taken.arguments.logical_null_count();
            text_bytes += payload_bytes(taken.arguments.as_ref());
            rows += take;
            memory_bytes += bytes;
            pieces.push(taken);
        }
        if pieces.is_empty() {
            return Ok(None);
        }
        self.next_rows = (self.next_rows * 2).min(self.most_rows);
        Ok(Some((pieces, memory_bytes)))
    }
}

/// How many rows of `arguments` hold `wanted` that are not null.
fn rows_with_texts(arguments: &ArrayRef, wanted: usize) -> usize {
    match arguments.logical_nulls().filter(|nulls| nulls.null_count() > 0) {
        None => arguments.len().min(wanted),
        Some(nulls) => nulls.valid_indices().nth(wanted.saturating_sub(1)).map_or(arguments.len(), |last| last + 1),
    }
}
