//! The audit: a sample of rows once more, each alone, and how far that is from what they got in company.
//!
//! A row's results must not depend on the rows that shared its batches. `--audit N` is the evidence: it keeps what N rows
//! were given and got, and at the end of the run computes each of them by itself.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::compute::take;
use arrow::datatypes::{DataType, Float32Type, Float64Type, UInt32Type};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::command::CommandSpec;
use super::control::RunControl;
use crate::batch::Padding;
use crate::engine::{BatchObserver, Engine, PreparedRows};
use crate::error::{Error, Result};
use crate::generation::SamplingParams;
use crate::heads::HeadOutput;

/// What the audit of a run found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AuditReport {
    /// Rows that were computed once more, alone; rows that an earlier run committed are not among them.
    pub rows: u64,
    /// What `largest_difference` is a difference of: the numbers that the model gave, before they became results.
    pub compared: &'static str,
    /// The largest difference of a number; null where there was none to compare.
    pub largest_difference: Option<f64>,
    /// The row of it, counted from 0 over the whole input.
    pub largest_difference_row: Option<u64>,
    /// Rows whose label, entities or text came out otherwise.
    pub rows_flipped: u64,
    /// The first of them.
    pub first_flipped_row: Option<u64>,
}

/// Which rows of a run are audited, with what they were given and got.
///
/// A row's place in the draw is a hash of the job's fingerprint and its number, so that the same job over the same rows
/// audits the same ones, whatever the threads and batches.
pub(super) struct AuditSample {
    wanted: usize,
    fingerprint: String,
    compared: &'static str,
    /// By place in the draw; the rows with the first `wanted` places are the sample.
    rows: BTreeMap<(u64, u64), AuditRow>,
}

/// A row of the sample.
pub(super) struct AuditRow {
    /// Its number in the whole input.
    pub number: u64,
    /// Its tokens.
    pub prepared: PreparedRows,
    /// The settings that it brought itself.
    pub params: Option<Arc<SamplingParams>>,
    /// What it got in company.
    pub results: RowResults,
}

/// What a row got.
#[derive(Default)]
pub(super) struct RowResults {
    /// What the head gave for each of its sequences.
    pub outputs: Vec<HeadOutput>,
    /// Its result columns, one entry each.
    pub columns: Vec<ArrayRef>,
}

/// How two results of a row differ.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Difference {
    /// Of the numbers.
    largest: Option<f64>,
    /// Whether anything that is no number differs.
    flipped: bool,
}

impl AuditSample {
    /// A sample of `wanted` rows of the job with this fingerprint.
    pub fn new(wanted: u64, fingerprint: &str, command: &CommandSpec) -> Self {
        let compared = match command {
            CommandSpec::Classify(_) => "logits",
            CommandSpec::Tag(_) => "label probabilities",
            CommandSpec::Embed(_) => "components of embeddings",
            CommandSpec::Score(_) => "log-probabilities",
            CommandSpec::Generate(options) if options.params.logprobs => "log-probabilities",
            CommandSpec::Generate(_) => "completions",
        };
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
        Self { wanted, fingerprint: fingerprint.to_owned(), compared, rows: BTreeMap::new() }
    }

    /// The indices of those rows of a window that may belong to the sample; `numbers` are all its rows' numbers.
    pub fn pick(&self, numbers: &[u64], prepared: &PreparedRows) -> Vec<usize> {
        let is_full = self.rows.len() >= self.wanted;
        let last = self.rows.last_key_value().map(|(place, _)| *place).filter(|_| is_full);
        let places = numbers.iter().enumerate().filter(|(index, _)| prepared.has_work(*index));
        let mut picked: Vec<((u64, u64), usize)> = places.map(|(index, number)| (self.place(*number), index)).collect();
        picked.retain(|(place, _)| last.is_none_or(|last| *place < last));
        picked.sort_unstable();
        picked.truncate(self.wanted);
        picked.into_iter().map(|(_, index)| index).collect()
    }

    /// Adds a row; whoever has the last place leaves where there are too many.
    pub fn add(&mut self, row: AuditRow) {
        self.rows.insert(self.place(row.number), row);
        while self.rows.len() > self.wanted {
            self.rows.pop_last();
        }
    }

    fn place(&self, number: u64) -> (u64, u64) {
        let digest = Sha256::digest(format!("audit {} {number}", self.fingerprint));
        let first = digest.iter().take(8).fold(0, |place, byte| (place << 8) | u64::from(*byte));
        (first, number)
    }

    /// Computes each row of the sample alone, and compares.
    ///
    /// # Errors
    /// When the model fails, or a stop was asked for.
    pub fn settle(self, engine: &Engine, control: &RunControl) -> Result<AuditReport> {
        let mut rows: Vec<AuditRow> = self.rows.into_values().collect();
        rows.sort_by_key(|row| row.number);
        let mut report = AuditReport::new(self.compared);
        for row in rows {
            control.check()?;
            let (number, results) = (row.number, row.results);
            let alone = alone(engine, row.prepared, number, row.params)?;
            report.add(number, results.difference(&alone));
        }
        Ok(report)
    }
}

/// Computes one row by itself.
fn alone(engine: &Engine, row: PreparedRows, number: u64, params: Option<Arc<SamplingParams>>) -> Result<RowResults> {
    let stopped = || Error::Internal("nobody asked the audit to stop".into());
    let Some(mut generation) = engine.start_generation::<()>() else {
        let inferred = engine.infer_keeping(row, &[0], &Unwatched)?.ok_or_else(stopped)?;
        let outputs = inferred.kept.into_iter().next().unwrap_or_default();
        return Ok(RowResults { outputs, columns: inferred.columns });
    };
    match params {
        Some(params) => generation.push_with((), row, std::iter::once((number, Ok(params)))),
        None => generation.push((), row, std::iter::once(number)),
    };
    loop {
        if let Some(((), inferred)) = generation.pop()? {
            return Ok(RowResults { outputs: Vec::new(), columns: inferred.columns });
        }
        if !generation.step(&Unwatched)? {
            return Err(stopped());
        }
    }
}

/// An audit is no progress.
struct Unwatched;

impl BatchObserver for Unwatched {
    fn after_batch(&self, _: u64, _: Padding) -> bool {
        true
    }
}

impl AuditReport {
    fn new(compared: &'static str) -> Self {
        Self {
            rows: 0,
            compared,
            largest_difference: None,
            largest_difference_row: None,
            rows_flipped: 0,
            first_flipped_row: None,
        }
    }

    fn add(&mut self, row: u64, difference: Difference) {
        self.rows += 1;
        if let Some(largest) = difference.largest
            && self.largest_difference.is_none_or(|so_far| largest > so_far)
        {
            (self.largest_difference, self.largest_difference_row) = (Some(largest), Some(row));
        }
        if difference.flipped {
            self.rows_flipped += 1;
            self.first_flipped_row.get_or_insert(row);
        }
    }

    /// What is to be warned of where a result changed.
    pub fn warning(&self) -> String {
        format!("{} audited rows have another result when they are alone", self.rows_flipped)
    }

    /// The finding in a sentence.
    pub fn line(&self) -> String {
        let rows = self.rows;
        let difference = match (self.largest_difference, self.largest_difference_row) {
            (Some(0.0), _) => format!("no difference of {}", self.compared),
            (Some(largest), Some(row)) => format!("largest difference of {} {largest:.1e} (row {row})", self.compared),
            _ => format!("{} compared", self.compared),
        };
        let flipped = match (self.rows_flipped, self.first_flipped_row) {
            (0, _) | (_, None) => "no result changed".to_owned(),
            (flipped, Some(row)) => format!("{flipped} rows have another result, the first is row {row}"),
        };
        format!("audit: {rows} rows computed once more, alone: {difference}, {flipped}")
    }
}

impl RowResults {
    /// The results of row `index` of some columns, apart from the other rows.
    ///
    /// # Errors
    /// When there is no such row.
    pub fn of_row(outputs: Vec<HeadOutput>, columns: &[ArrayRef], index: usize) -> Result<Self> {
        let index = arrow::array::PrimitiveArray::<UInt32Type>::from_value(index as u32, 1);
        let columns = columns.iter().map(|column| take(column, &index, None)).collect::<Result<_, _>>()?;
        Ok(Self { outputs, columns })
    }

    /// Numbers are those of the head where there are any, else those of the columns.
    fn difference(&self, other: &RowResults) -> Difference {
        let mut of_columns = Difference { largest: None, flipped: self.columns.len() != other.columns.len() };
        for (ours, theirs) in self.columns.iter().zip(&other.columns) {
            of_columns.compare(ours, theirs);
        }
        if self.outputs.is_empty() && other.outputs.is_empty() {
            return of_columns;
        }
        let numbers = |outputs: &[HeadOutput]| -> Vec<f64> { outputs.iter().flat_map(HeadOutput::numbers).collect() };
        let mut of_outputs = Difference { largest: None, flipped: of_columns.flipped };
        of_outputs.compare_numbers(&numbers(&self.outputs), &numbers(&other.outputs));
        of_outputs
    }
}

impl Difference {
    /// Numbers by their distance; another count of them, or one that is none on one side only, is another result.
    fn compare_numbers(&mut self, ours: &[f64], theirs: &[f64]) {
        self.flipped |= ours.len() != theirs.len();
        for (ours, theirs) in ours.iter().zip(theirs) {
            let distance = match (ours.is_finite(), theirs.is_finite()) {
                (true, true) => (ours - theirs).abs(),
                _ if ours.to_bits() == theirs.to_bits() => 0.0,
                _ => {
                    self.flipped = true;
                    continue;
                }
            };
            self.largest = Some(self.largest.map_or(distance, |largest| largest.max(distance)));
        }
    }

    /// Floating-point numbers by their distance, everything else by being equal.
    fn compare(&mut self, ours: &ArrayRef, theirs: &ArrayRef) {
        if ours.data_type() != theirs.data_type() || ours.len() != theirs.len() {
            self.flipped = true;
            return;
        }
        if (0..ours.len()).any(|row| ours.is_null(row) != theirs.is_null(row)) {
            self.flipped = true;
            return;
        }
        let valid = || (0..ours.len()).filter(|row| ours.is_valid(*row));
        match ours.data_type() {
            DataType::Float32 => {
                let values = |array: &ArrayRef| -> Vec<f64> {
                    valid().map(|row| f64::from(array.as_primitive::<Float32Type>().value(row))).collect()
                };
                self.compare_numbers(&values(ours), &values(theirs));
            }
            DataType::Float64 => {
                let values = |array: &ArrayRef| -> Vec<f64> {
                    valid().map(|row| array.as_primitive::<Float64Type>().value(row)).collect()
                };
                self.compare_numbers(&values(ours), &values(theirs));
            }
            DataType::List(_) => {
                valid().for_each(|row| {
                    self.compare(&ours.as_list::<i32>().value(row), &theirs.as_list::<i32>().value(row))
                });
            }
            DataType::FixedSizeList(_, _) => {
                valid().for_each(|row| {
                    self.compare(&ours.as_fixed_size_list().value(row), &theirs.as_fixed_size_list().value(row))
                });
            }
            DataType::Struct(_) => {
                for (ours, theirs) in ours.as_struct().columns().iter().zip(theirs.as_struct().columns()) {
                    self.compare(ours, theirs);
                }
            }
            _ => self.flipped |= ours != theirs,
        }
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{Float32Array, StringArray};
    use arrow::datatypes::Field;
    use candle_core::Device;

    use super::*;
    use crate::batch::PackedBatch;
    use crate::heads::{ClassifyOptions, Head};
    use crate::model::{Checkpoint, MistralModel};
    use crate::text::{TextTokenizer, TokenDetail};

    /// A head whose numbers depend on how many sequences share the batch, as a wrong attention mask would make them.
    struct Sociable;

    impl Head for Sociable {
        fn fields(&self) -> Vec<Field> {
            vec![Field::new("company", DataType::Utf8, true)]
        }

        fn forward(&self, _: &MistralModel, batch: &PackedBatch, _: &[&TokenDetail]) -> Result<Vec<HeadOutput>> {
            let count = batch.num_sequences() as f32;
            Ok((0..batch.num_sequences()).map(|_| HeadOutput::Values(vec![0.25 * count])).collect())
        }

        fn merge(&self, mut chunks: Vec<HeadOutput>) -> HeadOutput {
            chunks.swap_remove(0)
        }

        fn columns(&self, rows: &[Option<HeadOutput>]) -> Result<Vec<ArrayRef>> {
            let name = |row: &Option<HeadOutput>| {
                if row.iter().flat_map(HeadOutput::numbers).any(|n| n > 0.5) { "many" } else { "few" }
            };
            Ok(vec![Arc::new(rows.iter().map(|row| Some(name(row))).collect::<StringArray>())])
        }
    }

    /// Audits `wanted` of five rows that shared a batch.
    fn audited(head: impl FnOnce(&Checkpoint) -> Box<dyn Head>, wanted: u64) -> AuditReport {
        let dir = format!("{}/tests/goldens/checkpoints/cls-window-sharded", env!("CARGO_MANIFEST_DIR"));
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let tokenizer = TextTokenizer::open(&checkpoint.dir, checkpoint.config.vocab_size).unwrap();
        let model = MistralModel::load(&checkpoint, &Device::Cpu).unwrap();
        let engine = Engine::new(model, head(&checkpoint), tokenizer, 4096);
        let prompts = ["a", "b c", "d e f", "g", "h i"].map(|text| Some(text).into());
        let prepared = engine.prepare(&prompts);
        let numbers = [10, 11, 12, 13, 14];
        let mut sample = AuditSample::new(wanted, "job", &CommandSpec::Classify(ClassifyOptions::default()));
        let picked = sample.pick(&numbers, &prepared);
        let rows: Vec<PreparedRows> = picked.iter().map(|index| prepared.row(*index)).collect();
        let inferred = engine.infer_keeping(prepared, &picked, &Unwatched).unwrap().unwrap();
        for ((index, prepared), outputs) in picked.into_iter().zip(rows).zip(inferred.kept) {
            let results = RowResults::of_row(outputs, &inferred.columns, index).unwrap();
            sample.add(AuditRow { number: numbers[index], prepared, params: None, results });
        }
        sample.settle(&engine, &RunControl::default()).unwrap()
    }

    #[test]
    fn a_head_that_minds_its_company_is_found_out() {
        let report = audited(|_| Box::new(Sociable), 5);
        assert_eq!((report.rows, report.rows_flipped), (5, 5));
        assert_eq!((report.largest_difference, report.first_flipped_row), (Some(1.0), Some(10)));
        assert!(report.line().contains("5 rows have another result, the first is row 10"), "{}", report.line());
    }

    #[test]
    fn a_head_that_does_not_is_not() {
        let load = |checkpoint: &Checkpoint| -> Box<dyn Head> {
            let options = ClassifyOptions::default();
            Box::new(crate::heads::SequenceClassification::load(checkpoint, options, &Device::Cpu).unwrap())
        };
        let report = audited(load, 3);
        assert_eq!((report.rows, report.rows_flipped, report.first_flipped_row), (3, 0, None));
        assert!(report.largest_difference.unwrap() < 1e-4, "{report:?}");
    }

    #[test]
    fn the_sample_does_not_depend_on_how_rows_come() {
        let row = |number| AuditRow {
            number,
            prepared: PreparedRows::default(),
            params: None,
            results: RowResults::default(),
        };
        let sampled = |numbers: &mut dyn Iterator<Item = u64>, fingerprint: &str| {
            let mut sample = AuditSample::new(4, fingerprint, &CommandSpec::Classify(ClassifyOptions::default()));
            numbers.for_each(|number| sample.add(row(number)));
            sample.rows.into_values().map(|row| row.number).collect::<Vec<_>>()
        };
        let forwards = sampled(&mut (0..100), "job");
        assert_eq!(forwards.len(), 4);
        assert_eq!(forwards, sampled(&mut (0..100).rev(), "job"));
        assert_ne!(forwards, sampled(&mut (0..100), "another job"));
    }

    #[test]
    fn numbers_have_distances_and_everything_else_is_equal_or_not() {
        let floats = |values: &[f32]| Arc::new(Float32Array::from(values.to_vec())) as ArrayRef;
        let texts = |values: &[&str]| Arc::new(StringArray::from(values.to_vec())) as ArrayRef;
        let results = |columns| RowResults { outputs: Vec::new(), columns };
        let difference = |a, b| results(vec![a]).difference(&results(vec![b]));
        assert_eq!(difference(floats(&[1.0]), floats(&[1.5])), Difference { largest: Some(0.5), flipped: false });
        assert_eq!(difference(texts(&["a"]), texts(&["a"])), Difference { largest: None, flipped: false });
        assert_eq!(difference(texts(&["a"]), texts(&["b"])), Difference { largest: None, flipped: true });
        assert!(difference(floats(&[1.0]), floats(&[1.0, 1.0])).flipped);
        assert!(difference(floats(&[1.0]), floats(&[f32::NAN])).flipped);
        assert!(difference(floats(&[1.0]), texts(&["a"])).flipped);
    }
}
