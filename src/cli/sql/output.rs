//! Rows on standard output.

use std::io::{BufWriter, Stdout, Write, stdout};
use std::path::Path;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use arrow::json::WriterBuilder;
use arrow::json::writer::LineDelimited;
use arrow::util::display::FormatOptions;
use arrow::util::pretty::pretty_format_batches_with_options;
use parquet::arrow::ArrowWriter;

use super::Format;
use crate::data::single_file::write_csv;
use crate::error::{Error, Result, one_line};

/// Prints what statements give.
pub struct Output {
    format: Format,
    out: BufWriter<Stdout>,
    schema: Option<SchemaRef>,
    /// A table's rows: its columns are as wide as the widest.
    table: Vec<RecordBatch>,
    parquet: Option<ArrowWriter<Stdout>>,
    /// Whether a statement has had rows.
    used: bool,
}

impl Output {
    pub fn new(format: Format) -> Self {
        Self { format, out: BufWriter::new(stdout()), schema: None, table: Vec::new(), parquet: None, used: false }
    }

    /// Whether the output is read by a person, to whom more may be said.
    pub fn is_for_people(&self) -> bool {
        self.format == Format::Table
    }

    /// Begins a statement's rows.
    ///
    /// # Errors
    /// [`Error::Usage`] for a second statement's rows in a Parquet file.
    pub fn begin(&mut self, schema: SchemaRef) -> Result<()> {
        self.table.clear();
        match self.format {
            Format::Table | Format::Json => {}
            Format::Csv => {
                let mut writer = csv::Writer::from_writer(&mut self.out);
                let names = schema.fields().iter().map(|field| field.name());
                writer.write_record(names).and_then(|()| writer.flush().map_err(csv::Error::from)).or_else(closed)?;
            }
            Format::Parquet if self.used => {
                return Err(Error::Usage(
                    "--format parquet holds one statement's rows, and this one is the second with rows; \
                     use COPY (…) TO 'file.parquet' for more"
                        .into(),
                ));
            }
            Format::Parquet => {
                self.parquet = Some(ArrowWriter::try_new(stdout(), schema.clone(), None).map_err(parquet)?);
            }
        }
        self.used = true;
        self.schema = Some(schema);
        Ok(())
    }

    /// Takes rows.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        match self.format {
            Format::Table => self.table.push(batch.clone()),
            Format::Csv => {
                let mut text = csv::Writer::from_writer(Vec::new());
                write_csv(&mut text, batch, Path::new("standard output"))?;
                let text = text.into_inner().map_err(|error| Error::Internal(error.to_string()))?;
                self.print(&text)?;
            }
            Format::Json => {
                let mut text = Vec::new();
                let mut writer = WriterBuilder::new().with_explicit_nulls(true).build::<_, LineDelimited>(&mut text);
                writer.write(batch)?;
                writer.finish()?;
                drop(writer);
                self.print(&text)?;
            }
            Format::Parquet => {
                if let Some(writer) = &mut self.parquet {
                    writer.write(batch).map_err(parquet)?;
                }
            }
        }
        Ok(())
    }

    /// Ends a statement's rows.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn end(&mut self) -> Result<()> {
        if let (Format::Table, Some(schema)) = (self.format, self.schema.take()) {
            if self.table.is_empty() {
                self.table.push(RecordBatch::new_empty(schema));
            }
            let options = FormatOptions::default().with_null("").with_display_error(true);
            let table = pretty_format_batches_with_options(&self.table, &options)?;
            self.print(format!("{table}\n").as_bytes())?;
            self.table.clear();
        }
        self.out.flush().or_else(|error| closed(csv::Error::from(error)))
    }

    /// Ends the output.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(&mut self) -> Result<()> {
        match self.parquet.take() {
            Some(writer) => writer.close().map(drop).map_err(parquet),
            None => Ok(()),
        }
    }

    fn print(&mut self, text: &[u8]) -> Result<()> {
        self.out.write_all(text).or_else(|error| closed(csv::Error::from(error)))
    }
}

/// A reader that has seen enough is no failure.
fn closed(error: csv::Error) -> Result<()> {
    match error.into_kind() {
        csv::ErrorKind::Io(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        csv::ErrorKind::Io(error) => Err(Error::io("write to", "standard output")(error)),
        other => Err(Error::Internal(format!("{other:?}"))),
    }
}

fn parquet(error: parquet::errors::ParquetError) -> Error {
    Error::io("write to", "standard output")(std::io::Error::other(one_line(error)))
}
