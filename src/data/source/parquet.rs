//! Parquet files, decoded page by page: a row group may be a whole file.

use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::errors::ParquetError;

use super::decode::{Batches, Columns, Layout, Survey, guarded};
use super::pages::{CheckedPages, FirstFailure, fixed_width_bytes, load_metadata};
use crate::data::store::StoredFile;
use crate::error::Result;

/// Reads the footer. A schema that arrow wrote there is honoured.
///
/// # Errors
///
/// [`Error::InputCorrupt`](crate::Error::InputCorrupt) for a damaged footer, [`Error::Io`](crate::Error::Io) where the file cannot be read.
pub(crate) fn survey(stored: &StoredFile) -> Result<Survey> {
    let file = stored.open()?;
    guarded(stored.path(), String::new, || {
        let metadata = load_metadata(&file)?;
        let mut rows = 0u64;
        let widths = metadata.schema().fields().iter().map(|field| fixed_width_bytes(field.data_type()));
        let mut bytes_per_row = widths.fold(0, u64::saturating_add);
        let mut group_starts = Vec::with_capacity(metadata.metadata().num_row_groups());
        for group in metadata.metadata().row_groups() {
            let group_rows = natural(group.num_rows())?;
            group_starts.push(rows);
            rows = rows.checked_add(group_rows).ok_or_else(|| broken("more rows than can be counted"))?;
            let group_bytes = u64::try_from(group.total_byte_size()).unwrap_or(0);
            bytes_per_row = bytes_per_row.max(group_bytes.checked_div(group_rows).unwrap_or(0));
        }
        if natural(metadata.metadata().file_metadata().num_rows())? != rows {
            return Err(broken("its row groups do not add up to its number of rows"));
        }
        let columns = Columns::Typed(metadata.schema().clone());
        Ok(Survey { rows, bytes_per_row, layout: Layout::Parquet { group_starts }, columns })
    })
}

fn natural(number: i64) -> Result<u64, ParquetError> {
    u64::try_from(number).map_err(|_| broken("a negative number of rows"))
}

fn broken(message: &str) -> ParquetError {
    ParquetError::General(message.to_owned())
}

/// Decodes from exactly `first_row` on: row groups before it are not touched, pages before it are skipped.
///
/// # Errors
///
/// As [`survey`].
pub(crate) fn open(
    stored: &StoredFile,
    group_starts: &[u64],
    columns: &[&str],
    batch_rows: usize,
    first_row: u64,
) -> Result<Batches> {
    let file = stored.open()?;
    guarded(stored.path(), String::new, || {
        let metadata = load_metadata(&file)?;
        let failure = FirstFailure::default();
        let pages = CheckedPages::new(file, metadata.metadata(), failure.clone());
        let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(pages, metadata);
        if builder.metadata().num_row_groups() != group_starts.len() {
            return Err(broken("it has other row groups than before"));
        }
        let roots = builder.schema().fields().iter().enumerate();
        let roots = roots.filter(|(_, field)| columns.contains(&field.name().as_str())).map(|(root, _)| root);
        let mask = ProjectionMask::roots(builder.parquet_schema(), roots.collect::<Vec<_>>());
        let group = group_starts.partition_point(|&start| start <= first_row).saturating_sub(1);
        let skip = first_row - group_starts.get(group).copied().unwrap_or(0);
        let skip = usize::try_from(skip).map_err(|_| broken("more rows than can be counted"))?;
        let reader = builder
            .with_row_groups((group..group_starts.len()).collect())
            .with_projection(mask)
            .with_batch_size(batch_rows)
            .with_offset(skip)
            .build()?;
        Ok(Box::new(reader.map(move |batch| batch.map_err(|error| failure.behind(error)))) as Batches)
    })
}
