//! Reading units of a dataset as windows of rows.
//!
//! Consecutive units of one file continue one decoding stream; only a gap seeks. A window is a function
//! of its unit, the file and the options: it is cut by counting rows and the bytes of their text, never
//! by where a decoder's batches happen to end, so a resumed run sees the windows of an uninterrupted one.

pub(crate) mod arrow_ipc;
pub(crate) mod csv;
pub(crate) mod decode;
pub(crate) mod jsonl;
mod page_content;
mod pages;
pub(crate) mod parquet;
mod thrift;

use std::collections::VecDeque;
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, RecordBatchOptions, StringArray};
use arrow::compute::concat_batches;
use arrow::datatypes::{DataType, Schema, SchemaRef};
use arrow::error::ArrowError;

use self::decode::{Batches, Layout, corrupt_at, guarded};
use crate::data::dataset::{Dataset, InputFile};
use crate::data::drift::conform;
use crate::data::text_column::payload_bytes;
use crate::data::units::Unit;
use crate::error::{Error, Result};

/// Consecutive rows of one unit.
#[derive(Debug, Clone)]
pub struct Window {
    /// The number of the unit, as in [`Unit::index`].
    pub unit: usize,
    /// The first row's number in its file.
    pub first_row: u64,
    /// The rows.
    pub batch: RecordBatch,
    /// Whether this is the unit's last window.
    pub last: bool,
}

/// How much a window holds.
#[derive(Debug, Clone)]
pub struct WindowOptions {
    /// Names of columns of [`Dataset::schema`], partition columns among them, or all. They come in the
    /// order of the schema.
    pub projection: Option<Vec<String>>,
    /// The most rows of a window.
    pub window_rows: usize,
    /// A window ends early once its text and binary values, nested ones included, reach this many bytes;
    /// it is looked at after every [`InputFile::read_rows`] rows.
    pub window_bytes: usize,
}

/// Reads units as windows, in order. After an error it ends.
///
/// It holds one window and one decoded batch, about 8 MiB, of rows; of an Arrow file, one record batch
/// as its writer cut it.
pub struct WindowReader {
    dataset: Arc<Dataset>,
    units: std::vec::IntoIter<Unit>,
    /// The unit being read and its next row.
    current: Option<(Unit, u64)>,
    window_rows: usize,
    window_bytes: usize,
    /// The columns of a window.
    schema: SchemaRef,
    /// Those among them that are decoded; the rest are partition columns.
    file_schema: SchemaRef,
    /// For each partition column of the window, its place in [`InputFile::partitions`].
    partitions: Vec<usize>,
    stream: Option<Stream>,
}

/// A file being decoded.
struct Stream {
    file: usize,
    batches: Batches,
    /// Decoded rows that no window has taken yet, the first of them being `next_row` of the file.
    pending: VecDeque<RecordBatch>,
    next_row: u64,
}

impl WindowReader {
    /// A reader of `units`, which are some of the dataset's in ascending order.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] where the projection names no column of the dataset, or a unit no rows of it:
    /// both are the caller's to check.
    pub fn new(dataset: Arc<Dataset>, units: Vec<Unit>, options: WindowOptions) -> Result<Self> {
        for unit in &units {
            let rows = dataset.files.get(unit.file).map(|file| file.rows);
            if rows.is_none_or(|rows| unit.rows.end > rows || unit.rows.start > unit.rows.end) {
                return Err(Error::Internal(format!("unit {} lies outside the dataset", unit.index)));
            }
        }
        let fields = dataset.schema.fields();
        let chosen: Vec<usize> = match &options.projection {
            None => (0..fields.len()).collect(),
            Some(names) => {
                if let Some(name) = names.iter().find(|name| dataset.schema.index_of(name).is_err()) {
                    return Err(Error::Internal(format!("column '{name}' was asked for, but is not in the dataset")));
                }
                (0..fields.len()).filter(|&column| names.contains(fields[column].name())).collect()
            }
        };
        let file_columns = fields.len() - dataset.partition_columns;
        let schema = Arc::new(dataset.schema.project(&chosen)?);
        let (decoded, constant): (Vec<usize>, Vec<usize>) = chosen.iter().partition(|&&column| column < file_columns);
        let file_schema = Arc::new(dataset.schema.project(&decoded)?);
        let partitions = constant.into_iter().map(|column| column - file_columns).collect();
        Ok(WindowReader {
            dataset,
            units: units.into_iter(),
            current: None,
            window_rows: options.window_rows.max(1),
            window_bytes: options.window_bytes,
            schema,
            file_schema,
            partitions,
            stream: None,
        })
    }

    /// The columns of the windows.
    pub fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    fn next_window(&mut self) -> Result<Option<Window>> {
        let (unit, row) = match self.current.take() {
            Some(current) => current,
            None => match self.units.next() {
                Some(unit) => {
                    let start = unit.rows.start;
                    (unit, start)
                }
                None => return Ok(None),
            },
        };
        let batch = self.window(unit.file, row, unit.rows.end)?;
        let end = row + batch.num_rows() as u64;
        let last = end == unit.rows.end;
        if last {
            // Before the caller can commit the unit: a file that was replaced gives other rows, not bad ones.
            self.dataset.verify_unchanged(unit.file)?;
        }
        let window = Window { unit: unit.index, first_row: row, batch, last };
        if !last {
            self.current = Some((unit, end));
        }
        Ok(Some(window))
    }

    /// The window that starts at `row` of a file and does not reach beyond `end`.
    fn window(&mut self, file: usize, row: u64, end: u64) -> Result<RecordBatch> {
        let dataset = Arc::clone(&self.dataset);
        let input = &dataset.files[file];
        let mut pieces = Vec::new();
        let (mut rows, mut bytes) = (0, 0);
        let wanted = usize::try_from(end - row).map_or(self.window_rows, |left| left.min(self.window_rows));
        if wanted > 0 {
            let mut stream = match self.stream.take() {
                Some(stream) if stream.file == file && stream.next_row == row => stream,
                _ => Stream::open(&dataset, file, row, &self.file_schema)?,
            };
            while rows < wanted && (rows == 0 || bytes < self.window_bytes) {
                let piece = input.read_rows.min(wanted - rows);
                for batch in stream.take(&dataset, piece, &self.file_schema)? {
                    bytes += batch.columns().iter().map(|column| payload_bytes(column.as_ref())).sum::<usize>();
                    pieces.push(batch);
                }
                rows += piece;
            }
            self.stream = Some(stream);
        }
        let batch = match pieces.len() {
            1 => pieces.remove(0),
            // A dictionary's keys, or 32-bit offsets, may be too few for the window.
            _ => guarded(&input.path, || input.layout.place(row), || concat_batches(&self.file_schema, &pieces))?,
        };
        Ok(self.with_partitions(input, batch)?)
    }

    fn with_partitions(&self, input: &InputFile, batch: RecordBatch) -> Result<RecordBatch, ArrowError> {
        let rows = batch.num_rows();
        let mut columns = batch.columns().to_vec();
        let fields = &self.schema.fields()[columns.len()..];
        for (field, &place) in fields.iter().zip(&self.partitions) {
            let value = input.partitions.get(place).and_then(Option::as_deref);
            let column: ArrayRef = match field.data_type() {
                DataType::Int64 => {
                    let value = value.and_then(|value| value.parse::<i64>().ok());
                    Arc::new(std::iter::repeat_n(value, rows).collect::<Int64Array>())
                }
                _ => Arc::new(std::iter::repeat_n(value, rows).collect::<StringArray>()),
            };
            columns.push(column);
        }
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        RecordBatch::try_new_with_options(Arc::clone(&self.schema), columns, &options)
    }
}

impl Iterator for WindowReader {
    type Item = Result<Window>;

    fn next(&mut self) -> Option<Self::Item> {
        let window = self.next_window();
        if window.is_err() {
            self.units = Vec::new().into_iter();
            self.current = None;
            self.stream = None;
        }
        window.transpose()
    }
}

impl Stream {
    /// Starts decoding at `row`, or at the nearest row before it where decoding can start.
    fn open(dataset: &Dataset, file: usize, row: u64, wanted: &SchemaRef) -> Result<Stream> {
        let input = &dataset.files[file];
        let columns = decoded_columns(input, wanted);
        let opened = match &input.layout {
            Layout::Parquet { group_starts } => {
                parquet::open(&input.stored, group_starts, &columns, input.read_rows, row).map(|batches| (batches, row))
            }
            layout @ (Layout::ArrowFile { .. } | Layout::ArrowStream { .. }) => {
                arrow_ipc::open(&input.stored, layout, &columns, row)
            }
            Layout::Lines { offsets } => {
                let open = if input.format == crate::data::format::InputFormat::Csv { csv::open } else { jsonl::open };
                open(&input.stored, offsets, &input.schema, &columns, input.read_rows, row)
            }
        };
        let (batches, next_row) = opened.map_err(|error| changed_or(dataset, file, error))?;
        let mut stream = Stream { file, batches, pending: VecDeque::new(), next_row };
        while stream.next_row < row {
            let skipped = (row - stream.next_row).min(input.read_rows as u64) as usize;
            stream.take(dataset, skipped, wanted)?;
        }
        Ok(stream)
    }

    /// The next `rows` rows, in as many batches as they were decoded in.
    fn take(&mut self, dataset: &Dataset, rows: usize, wanted: &SchemaRef) -> Result<Vec<RecordBatch>> {
        let mut taken = Vec::new();
        let mut left = rows;
        while left > 0 {
            let Some(batch) = self.pending.pop_front() else {
                let batch = self.decode(dataset, wanted).map_err(|error| changed_or(dataset, self.file, error))?;
                self.pending.push_back(batch);
                continue;
            };
            if batch.num_rows() > left {
                self.pending.push_front(batch.slice(left, batch.num_rows() - left));
                taken.push(batch.slice(0, left));
                left = 0;
            } else if batch.num_rows() > 0 {
                left -= batch.num_rows();
                taken.push(batch);
            }
        }
        self.next_row += rows as u64;
        Ok(taken)
    }

    /// The decoder's next batch, in the dataset's order and types.
    fn decode(&mut self, dataset: &Dataset, wanted: &SchemaRef) -> Result<RecordBatch> {
        let input = &dataset.files[self.file];
        // The rows of the next batch; those that wait here were decoded well.
        let waiting: usize = self.pending.iter().map(RecordBatch::num_rows).sum();
        let place = || input.layout.places(self.next_row + waiting as u64, input.read_rows as u64);
        let batches = &mut self.batches;
        let batch = guarded(&input.path, place, || {
            let Some(batch) = batches.next().transpose()? else { return Ok(None) };
            let columns = wanted.fields().iter().map(|field| {
                let column = batch.column_by_name(field.name());
                let column = column.ok_or_else(|| ArrowError::SchemaError(format!("no column '{}'", field.name())))?;
                conform(column, field.data_type())
            });
            let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
            let columns = columns.collect::<Result<Vec<_>, ArrowError>>()?;
            RecordBatch::try_new_with_options(Arc::clone(wanted), columns, &options).map(Some)
        })?;
        batch.ok_or_else(|| corrupt_at(&input.path, place(), format!("its rows end before row {}", input.rows)))
    }
}

/// The columns to decode: those wanted. Text decoders find no rows without a column, so they get one.
fn decoded_columns<'a>(input: &'a InputFile, wanted: &'a Schema) -> Vec<&'a str> {
    let source = match (wanted.fields().is_empty(), &input.layout) {
        (true, Layout::Lines { .. }) => input.schema.fields().iter().take(1),
        _ => wanted.fields().iter().take(usize::MAX),
    };
    source.map(|field| field.name().as_str()).collect()
}

/// A file that was replaced while it was read fails to decode, and so does one whose store fails; then that is the news.
fn changed_or(dataset: &Dataset, file: usize, error: Error) -> Error {
    let error = dataset.files[file].stored.explain(error);
    if let Error::Store { .. } | Error::InputChanged { .. } = error {
        return error;
    }
    match dataset.verify_unchanged(file) {
        Err(changed @ Error::InputChanged { .. }) => changed,
        _ => error,
    }
}

#[cfg(test)]
mod store_tests;
#[cfg(test)]
pub(crate) mod tests;
