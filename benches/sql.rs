//! The same dataset through `classify`'s own steps, through `SELECT ai_classify(...)`, and the naive way, an asynchronous
//! function that runs the model on each record batch: `cargo bench --bench sql -- MODEL DATA [ROUNDS [COPIES]]`.
//!
//! DATA is a Parquet file with a column `text`, read COPIES times in a row. All three run in turn in each of ROUNDS, so that
//! a busy machine is busy for all of them; the model is loaded before. A ratio is the median of the rounds' ratios.

use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Instant;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::compute::{cast, concat_batches};
use arrow::datatypes::DataType;
use async_trait::async_trait;
use candle_core::Device;
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::async_udf::{AsyncScalarUDF, AsyncScalarUDFImpl};
use datafusion::logical_expr::{
    ColumnarValue, ScalarFunctionArgs, ScalarUDFImpl, Signature, TypeSignature, Volatility,
};
use datafusion::prelude::{SessionConfig, SessionContext};
use mimalloc::MiMalloc;
use mistral_batch::batch::Padding;
use mistral_batch::engine::{BatchObserver, Engine};
use mistral_batch::heads::{ClassifyOptions, SequenceClassification};
use mistral_batch::model::{Checkpoint, MistralModel};
use mistral_batch::sql::{self, ModelRegistry, RegistryOptions};
use mistral_batch::text::{Overflow, Prompt, TextTokenizer};

/// As in the program.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Rows of a window in the command and in SQL.
const WINDOW_ROWS: usize = 4096;

struct Everything;

impl BatchObserver for Everything {
    fn after_batch(&self, _: u64, _: Padding) -> bool {
        true
    }
}

fn engine(model: &str) -> mistral_batch::Result<Engine> {
    let checkpoint = Checkpoint::open(model)?;
    let tokenizer = TextTokenizer::open(&checkpoint.dir, checkpoint.config.vocab_size)?;
    let limit = tokenizer.model_max_length().unwrap_or(usize::MAX).min(checkpoint.config.max_position_embeddings);
    let tokenizer = tokenizer.with_limit(limit, Overflow::TruncateRight, 0)?;
    let head = SequenceClassification::load(&checkpoint, ClassifyOptions::default(), &Device::Cpu)?;
    let model = MistralModel::load(&checkpoint, &Device::Cpu)?;
    Ok(Engine::new(model, Box::new(head), tokenizer, RegistryOptions::default().max_batch_tokens))
}

/// Labels of texts, window by window, and the tokens that it took.
fn classify(engine: &Engine, texts: &ArrayRef) -> mistral_batch::Result<(Vec<ArrayRef>, u64)> {
    let (mut labels, mut tokens) = (Vec::new(), 0);
    for first in (0..texts.len()).step_by(WINDOW_ROWS) {
        let window = texts.slice(first, WINDOW_ROWS.min(texts.len() - first));
        let prompts: Vec<Prompt> = window.as_string::<i32>().iter().map(Prompt::from).collect();
        if let Some(inferred) = engine.infer(engine.prepare(&prompts), &Everything)? {
            labels.push(inferred.columns[0].clone());
            tokens += inferred.stats.padding.real_tokens;
        }
    }
    Ok((labels, tokens))
}

/// What one would write first.
struct Naive {
    engine: Arc<Engine>,
    signature: Signature,
}

impl std::fmt::Debug for Naive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Naive")
    }
}

impl PartialEq for Naive {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.engine, &other.engine)
    }
}

impl Eq for Naive {}

impl Hash for Naive {
    fn hash<H: Hasher>(&self, state: &mut H) {
        "naive".hash(state);
    }
}

impl ScalarUDFImpl for Naive {
    fn name(&self) -> &str {
        "naive_classify"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(DataType::Utf8)
    }

    fn invoke_with_args(&self, _: ScalarFunctionArgs) -> Result<ColumnarValue> {
        Err(DataFusionError::Internal("an asynchronous function".to_owned()))
    }
}

#[async_trait]
impl AsyncScalarUDFImpl for Naive {
    async fn invoke_async_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let texts = cast(&args.args[0].to_array(args.number_rows)?, &DataType::Utf8)?;
        let external = |error| DataFusionError::External(Box::new(error));
        let (labels, _) = classify(&self.engine, &texts).map_err(external)?;
        let labels: Vec<&dyn Array> = labels.iter().map(|labels| labels.as_ref() as &dyn Array).collect();
        Ok(ColumnarValue::Array(arrow::compute::concat(&labels)?))
    }
}

async fn rows(context: &SessionContext, query: &str) -> Result<RecordBatch> {
    let frame = sql::query(context, query).await?;
    let schema = Arc::new(frame.schema().as_arrow().clone());
    Ok(concat_batches(&schema, &frame.collect().await?)?)
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_unstable_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let [model, data, numbers @ ..] = &arguments[..] else {
        eprintln!("usage: cargo bench --bench sql -- MODEL DATA [ROUNDS [COPIES]]");
        return Ok(());
    };
    let number =
        |place: usize, default: usize| numbers.get(place).and_then(|text| text.parse().ok()).unwrap_or(default);
    let (rounds, copies) = (number(0, 5), number(1, 4));

    let models = Arc::new(ModelRegistry::new(RegistryOptions::default()));
    models.add("model", model)?;
    let context = SessionContext::new_with_config(SessionConfig::new().with_target_partitions(1));
    sql::register(&context, models)?;
    context.register_parquet("one", data, Default::default()).await?;
    let text = rows(&context, "SELECT arrow_cast(text, 'Utf8') AS text FROM one").await?;
    let text = concat_batches(&text.schema(), std::iter::repeat_n(&text, copies))?;
    let texts = text.column(0).clone();
    // As a file would come: in record batches of the session's size.
    let batches: Vec<_> =
        (0..text.num_rows()).step_by(8192).map(|first| text.slice(first, 8192.min(text.num_rows() - first))).collect();
    let table = datafusion::datasource::MemTable::try_new(text.schema(), vec![batches])?;
    context.register_table("data", Arc::new(table))?;
    let engine = Arc::new(engine(model)?);
    let signature = Signature::new(TypeSignature::Any(1), Volatility::Immutable);
    let naive = Naive { engine: engine.clone(), signature };
    context.register_udf(AsyncScalarUDF::new(Arc::new(naive)).into_scalar_udf());

    let in_sql = "SELECT ai_classify(text).label AS label FROM data WHERE ai_classify(text).score > 0";
    let naively = "SELECT naive_classify(text) AS label FROM data WHERE naive_classify(text) IS NOT NULL";
    let (labels, tokens) = classify(&engine, &texts)?;
    let labels: Vec<&dyn Array> = labels.iter().map(|labels| labels.as_ref() as &dyn Array).collect();
    let labels = arrow::compute::concat(&labels)?;
    for query in [in_sql, naively] {
        let answer = rows(&context, query).await?;
        assert_eq!(answer.column(0).as_ref() as &dyn Array, labels.as_ref(), "the same labels: {query}");
    }

    // By round: seconds of each of the three.
    let mut times: Vec<[f64; 3]> = Vec::new();
    for _ in 0..rounds {
        let start = Instant::now();
        classify(&engine, &texts)?;
        let mut seconds = [start.elapsed().as_secs_f64(), 0.0, 0.0];
        for (place, query) in [(1, in_sql), (2, naively)] {
            let start = Instant::now();
            let answer = rows(&context, query).await?;
            seconds[place] = start.elapsed().as_secs_f64();
            assert_eq!(answer.num_rows(), texts.len());
        }
        times.push(seconds);
    }
    println!("{} rows, {tokens} tokens, medians of {rounds} rounds", texts.len());
    for (place, what) in
        ["classify, window by window", "SELECT ai_classify", "naive asynchronous function"].iter().enumerate()
    {
        println!(
            "{what:<28} {:>9.0} tokens/s  {:.3} of classify",
            tokens as f64 / median(times.iter().map(|seconds| seconds[place]).collect()),
            median(times.iter().map(|seconds| seconds[0] / seconds[place]).collect())
        );
    }
    Ok(())
}
