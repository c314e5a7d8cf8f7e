//! How a dataset is cut into units: row ranges of one file each, the grain of commit and resume.

use std::ops::Range;

/// Rows of a unit where nothing else was asked for.
pub const DEFAULT_UNIT_ROWS: u64 = 4096;

/// Units grow rather than let the rows of one dataset fall into more parts than this. Every file
/// ends a unit, so a dataset of many files has about one part more per file.
pub const MAX_PARTS: u64 = 10_000;

/// A row range of one input file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// The unit's number in the whole job, from 0 without gaps.
    pub index: usize,
    /// The file's place in the dataset.
    pub file: usize,
    /// Rows within the file.
    pub rows: Range<u64>,
}

/// The rows of a unit: `requested` or the default, times the smallest factor that keeps
/// `total_rows` within [`MAX_PARTS`] units.
pub fn unit_rows(total_rows: u64, requested: Option<u64>) -> u64 {
    let base = requested.unwrap_or(DEFAULT_UNIT_ROWS).max(1);
    let factor = total_rows.div_ceil(base.saturating_mul(MAX_PARTS)).max(1);
    base.saturating_mul(factor)
}

/// Cuts files of `file_rows` rows into units of at most `unit_rows` rows, keeping the first `limit` rows.
///
/// Units are in the order of the rows and never cross a file; empty files give none. Where no row
/// is left, there is one empty unit of file 0, so that an empty dataset has an output with a schema.
///
/// Files of 5 and 3 rows, units of 4: `0: 0..4`, `0: 4..5`, `1: 0..3`.
pub fn cut_units(file_rows: &[u64], unit_rows: u64, limit: Option<u64>) -> Vec<Unit> {
    let unit_rows = unit_rows.max(1);
    let mut left = limit.unwrap_or(u64::MAX);
    let mut units = Vec::new();
    for (file, &rows) in file_rows.iter().enumerate() {
        let rows = rows.min(left);
        left -= rows;
        let mut start = 0;
        while start < rows {
            let end = rows.min(start.saturating_add(unit_rows));
            units.push(Unit { index: units.len(), file, rows: start..end });
            start = end;
        }
    }
    if units.is_empty() {
        units.push(Unit { index: 0, file: 0, rows: 0..0 });
    }
    units
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn units_grow_until_parts_fit() {
        assert_eq!(unit_rows(0, None), 4096);
        assert_eq!(unit_rows(4096 * MAX_PARTS, None), 4096);
        assert_eq!(unit_rows(4096 * MAX_PARTS + 1, None), 8192);
        assert_eq!(unit_rows(1_000_000, Some(10)), 100);
        assert_eq!(unit_rows(5, Some(0)), 1);
        assert!(unit_rows(u64::MAX, Some(u64::MAX)) > 0);
    }

    #[test]
    fn no_rows_give_one_empty_unit() {
        let empty = vec![Unit { index: 0, file: 0, rows: 0..0 }];
        assert_eq!(cut_units(&[], 4, None), empty);
        assert_eq!(cut_units(&[0, 0], 4, None), empty);
        assert_eq!(cut_units(&[5], 4, Some(0)), empty);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn units_cover_every_row_once_in_order(
            file_rows in prop::collection::vec(0u64..40, 1..6),
            unit_rows in 1u64..20,
            limit in prop::option::of(0u64..120),
        ) {
            let units = cut_units(&file_rows, unit_rows, limit);
            let covered: Vec<(usize, u64)> =
                units.iter().flat_map(|unit| unit.rows.clone().map(|row| (unit.file, row))).collect();
            let expected: Vec<(usize, u64)> = file_rows
                .iter()
                .enumerate()
                .flat_map(|(file, &rows)| (0..rows).map(move |row| (file, row)))
                .take(limit.unwrap_or(u64::MAX) as usize)
                .collect();
            for (number, unit) in units.iter().enumerate() {
                prop_assert_eq!(unit.index, number);
                prop_assert!(unit.rows.end - unit.rows.start <= unit_rows);
                prop_assert!(unit.rows.start < unit.rows.end || expected.is_empty());
            }
            prop_assert_eq!(covered, expected);
        }
    }
}
