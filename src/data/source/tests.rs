use std::fs::{self, File};
use std::path::Path;

use ::parquet::arrow::ArrowWriter;
use ::parquet::file::properties::WriterProperties;
use arrow::array::{
    Array, AsArray, BooleanArray, DictionaryArray, Float64Array, LargeStringArray, ListBuilder, StringBuilder,
    StringViewArray, StructArray,
};
use arrow::compute::cast;
use arrow::datatypes::{Field, Int32Type};
use arrow::ipc::writer::{FileWriter, StreamWriter};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::data::dataset::DatasetOptions;
use crate::data::text_column::as_text;
use crate::data::units::{cut_units, unit_rows};
use crate::error::ExitCode;

pub(crate) fn write_parquet(path: &Path, batch: &RecordBatch, group_rows: usize, page_rows: usize) {
    let properties = WriterProperties::builder()
        .set_max_row_group_row_count(Some(group_rows))
        .set_data_page_row_count_limit(page_rows)
        .set_write_batch_size(page_rows.min(64))
        .build();
    let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), Some(properties)).unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
}

pub(crate) fn write_arrow_file(path: &Path, batches: &[RecordBatch]) {
    let mut writer = FileWriter::try_new(File::create(path).unwrap(), &batches[0].schema()).unwrap();
    batches.iter().for_each(|batch| writer.write(batch).unwrap());
    writer.finish().unwrap();
}

pub(crate) fn write_arrow_stream(path: &Path, batches: &[RecordBatch]) {
    let mut writer = StreamWriter::try_new(File::create(path).unwrap(), &batches[0].schema()).unwrap();
    batches.iter().for_each(|batch| writer.write(batch).unwrap());
    writer.finish().unwrap();
}

fn all(window_rows: usize) -> WindowOptions {
    WindowOptions { projection: None, window_rows, window_bytes: usize::MAX }
}

fn units(dataset: &Dataset, unit_rows: u64) -> Vec<Unit> {
    let rows: Vec<u64> = dataset.files.iter().map(|file| file.rows).collect();
    cut_units(&rows, unit_rows, None)
}

fn read(dataset: &Arc<Dataset>, units: Vec<Unit>, options: &WindowOptions) -> Vec<Window> {
    let reader = WindowReader::new(Arc::clone(dataset), units, options.clone()).unwrap();
    reader.collect::<Result<Vec<_>>>().unwrap()
}

/// Every row of the dataset in one batch.
pub(crate) fn read_all(dataset: &Arc<Dataset>) -> RecordBatch {
    let windows = read(dataset, units(dataset, 7), &all(3));
    concat_batches(&dataset.schema, windows.iter().map(|window| &window.batch)).unwrap()
}

fn open(path: &Path) -> Arc<Dataset> {
    let inputs = vec![path.to_str().unwrap().to_owned()];
    Arc::new(Dataset::open(&DatasetOptions { inputs, ..DatasetOptions::default() }).unwrap())
}

/// Rows of every kind of column that text may stand in, some of them null.
fn table(rows: usize) -> RecordBatch {
    let text = |row: usize| (row % 5 != 3).then(|| format!("row {row} {}", "ü, \"x\"\n".repeat(row % 4)));
    let texts: Vec<Option<String>> = (0..rows).map(text).collect();
    let mut tags = ListBuilder::new(StringBuilder::new());
    for row in 0..rows {
        match row % 3 {
            0 => tags.append_null(),
            count => tags.append_value((0..count).map(|tag| Some(format!("t{tag}")))),
        }
    }
    let plain: ArrayRef = Arc::new(StringArray::from(texts.clone()));
    let object = StructArray::from(vec![
        (Arc::new(Field::new("role", DataType::Utf8, true)), Arc::clone(&plain)),
        (
            Arc::new(Field::new("sure", DataType::Boolean, true)),
            Arc::new(BooleanArray::from_iter((0..rows).map(|row| Some(row % 2 == 0)))) as ArrayRef,
        ),
    ]);
    let labels = (0..rows).map(|row| (row % 4 != 0).then_some(["a", "b", "c"][row % 3]));
    RecordBatch::try_from_iter_with_nullable(vec![
        ("id", Arc::new(Int64Array::from_iter_values(0..rows as i64)) as ArrayRef, false),
        ("plain", plain, true),
        ("large", Arc::new(LargeStringArray::from(texts.clone())), true),
        ("view", Arc::new(StringViewArray::from_iter(texts)), true),
        ("label", Arc::new(labels.collect::<DictionaryArray<Int32Type>>()), true),
        ("weight", Arc::new(Float64Array::from_iter_values((0..rows).map(|row| row as f64 / 2.0))), true),
        ("tags", Arc::new(tags.finish()), true),
        ("object", Arc::new(object), true),
    ])
    .unwrap()
}

/// The rows without what decoders may choose: dictionaries unpacked, views copied.
fn plain(batch: &RecordBatch) -> Vec<ArrayRef> {
    let unpack = |column: &ArrayRef| match column.data_type() {
        DataType::Dictionary(..) | DataType::Utf8View => cast(column, &DataType::Utf8).unwrap(),
        _ => Arc::clone(column),
    };
    batch.columns().iter().map(unpack).collect()
}

fn assert_same_rows(found: &RecordBatch, expected: &RecordBatch) {
    assert_eq!(found.schema().fields(), expected.schema().fields());
    assert_eq!(plain(found), plain(expected));
}

/// The table as one file of each format; text formats hold its `id` and `plain` columns only.
fn files(folder: &TempDir, rows: usize, piece: usize) -> Vec<(std::path::PathBuf, RecordBatch)> {
    let table = table(rows);
    let narrow = table.project(&[0, 1]).unwrap();
    let nullable =
        Arc::new(Schema::new(vec![Field::new("id", DataType::Int64, true), Field::new("plain", DataType::Utf8, true)]));
    let narrow = RecordBatch::try_new(nullable, narrow.columns().to_vec()).unwrap();
    let pieces: Vec<RecordBatch> =
        (0..rows).step_by(piece).map(|start| table.slice(start, piece.min(rows - start))).collect();
    let path = |name: &str| folder.path().join(name);
    write_parquet(&path("a.parquet"), &table, piece * 3, piece);
    write_arrow_file(&path("a.arrow"), &pieces);
    write_arrow_stream(&path("a.arrows"), &pieces);
    let mut csv = String::from("id,plain\n");
    let mut jsonl = String::new();
    let texts = as_text(table.column(1)).unwrap();
    for (id, text) in texts.iter().enumerate() {
        csv += &format!("{id},{}\n", text.map(|text| format!("\"{}\"", text.replace('"', "\"\""))).unwrap_or_default());
        jsonl += &format!("{}\n", serde_json::json!({"id": id, "plain": text}));
    }
    fs::write(path("a.csv"), csv).unwrap();
    fs::write(path("a.jsonl"), jsonl).unwrap();
    let wide = ["a.parquet", "a.arrow", "a.arrows"].map(|name| (path(name), table.clone()));
    let narrow = ["a.csv", "a.jsonl"].map(|name| (path(name), narrow.clone()));
    wide.into_iter().chain(narrow).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn windows_are_the_rows_and_the_same_alone_or_in_sequence(
        rows in 1usize..120,
        piece in 1usize..40,
        read_rows in 1usize..50,
        unit_rows in 1u64..50,
        window_rows in 1usize..40,
        window_bytes in prop_oneof![Just(usize::MAX), 0usize..400],
        chosen in prop::collection::vec(any::<bool>(), 120),
    ) {
        let folder = tempfile::tempdir().unwrap();
        for (path, expected) in files(&folder, rows, piece) {
            let mut dataset = Arc::unwrap_or_clone(open(&path));
            dataset.files[0].read_rows = read_rows;
            let dataset = Arc::new(dataset);
            let options = WindowOptions { projection: None, window_rows, window_bytes };
            let units = units(&dataset, unit_rows);
            let windows = read(&dataset, units.clone(), &options);
            let mut next = 0;
            for window in &windows {
                prop_assert_eq!(window.first_row, next);
                prop_assert!(window.batch.num_rows() <= window_rows);
                next += window.batch.num_rows() as u64;
                prop_assert_eq!(window.last, next == units[window.unit].rows.end);
            }
            let found = concat_batches(&dataset.schema, windows.iter().map(|window| &window.batch)).unwrap();
            assert_same_rows(&found, &expected);

            // A resumed run reads some of the units.
            let subset: Vec<Unit> = units.into_iter().filter(|unit| chosen[unit.index]).collect();
            let again = read(&dataset, subset, &options);
            let before: Vec<&Window> = windows.iter().filter(|window| chosen[window.unit]).collect();
            prop_assert_eq!(again.len(), before.len());
            for (again, before) in again.iter().zip(before) {
                prop_assert_eq!((again.unit, again.first_row, again.last), (before.unit, before.first_row, before.last));
                assert_same_rows(&again.batch, &before.batch);
            }
        }
    }
}

#[test]
fn one_row_group_of_many_pages_is_read_from_any_row() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let table = table(10_000);
    write_parquet(&path, &table, 10_000, 100);
    let dataset = open(&path);
    assert!(dataset.files[0].read_rows > 1);
    let windows = read(&dataset, units(&dataset, 4096), &all(1000));
    assert_eq!(windows.iter().map(|window| window.batch.num_rows()).max(), Some(1000));
    let found = concat_batches(&dataset.schema, windows.iter().map(|window| &window.batch)).unwrap();
    assert_same_rows(&found, &table);
    let last = read(&dataset, vec![Unit { index: 9, file: 0, rows: 9_995..10_000 }], &all(1000));
    assert_same_rows(&last[0].batch, &table.slice(9_995, 5));
}

#[test]
fn text_files_are_entered_at_recorded_rows() {
    let folder = tempfile::tempdir().unwrap();
    for (path, expected) in files(&folder, 9_000, 9_000).into_iter().skip(3) {
        let dataset = open(&path);
        let Layout::Lines { offsets } = &dataset.files[0].layout else { unreachable!() };
        assert_eq!(offsets.len(), 3);
        for start in [0, 4095, 4096, 8192, 8999] {
            let unit = Unit { index: 0, file: 0, rows: start..start + 1 };
            assert_same_rows(&read(&dataset, vec![unit], &all(10))[0].batch, &expected.slice(start as usize, 1));
        }
    }
}

#[test]
fn a_row_that_starts_with_a_byte_order_mark_keeps_it() {
    let folder = tempfile::tempdir().unwrap();
    for (name, line_end) in [("unix.csv", "\n"), ("windows.csv", "\r\n")] {
        let path = folder.path().join(name);
        fs::write(&path, ["\u{feff}a", "\u{feff}x", "y", ""].join(line_end)).unwrap();
        let column = read_all(&open(&path)).column(0).clone();
        assert_eq!(as_text(&column).unwrap().iter().collect::<Vec<_>>(), [Some("\u{feff}x"), Some("y")]);
    }
}

#[test]
fn projections_come_in_the_order_of_the_schema() {
    let folder = tempfile::tempdir().unwrap();
    for (path, expected) in files(&folder, 20, 6) {
        let hive = folder.path().join("hive/k=7");
        fs::create_dir_all(&hive).unwrap();
        fs::copy(&path, hive.join(path.file_name().unwrap())).unwrap();
        let dataset = open(&folder.path().join("hive"));
        let project = |names: &[&str]| {
            let projection = Some(names.iter().map(|name| (*name).to_owned()).collect());
            let options = WindowOptions { projection, ..all(8) };
            let windows = read(&dataset, units(&dataset, 10), &options);
            concat_batches(&windows[0].batch.schema(), windows.iter().map(|window| &window.batch)).unwrap()
        };
        let found = project(&["k", "plain"]);
        assert_eq!(found.schema().fields().len(), 2);
        assert_eq!(found.column(0), expected.column(1));
        assert_eq!(found.column(1).as_primitive::<arrow::datatypes::Int64Type>().values(), &[7; 20]);
        assert_eq!(project(&["k"]).num_rows(), 20);
        assert_eq!(project(&[]).num_rows(), 20);
        let unknown = WindowOptions { projection: Some(vec!["nope".to_owned()]), ..all(8) };
        assert!(WindowReader::new(Arc::clone(&dataset), Vec::new(), unknown).is_err());
        fs::remove_dir_all(&hive).unwrap();
    }
}

#[test]
fn readers_move_between_threads() {
    fn movable<T: Send>() {}
    movable::<WindowReader>();
}

#[test]
fn an_empty_unit_is_one_empty_window() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.csv");
    fs::write(&path, "a,b\n").unwrap();
    let dataset = open(&path);
    let windows = read(&dataset, units(&dataset, 10), &all(8));
    assert_eq!(windows.len(), 1);
    assert!(windows[0].last && windows[0].batch.num_rows() == 0 && windows[0].batch.num_columns() == 2);
}

#[test]
fn a_file_that_changes_ends_the_reading_before_its_unit_does() {
    let folder = tempfile::tempdir().unwrap();
    for (path, _) in files(&folder, 100, 10) {
        let dataset = open(&path);
        let mut reader = WindowReader::new(Arc::clone(&dataset), units(&dataset, 100), all(30)).unwrap();
        assert!(!reader.next().unwrap().unwrap().last);
        let mut content = fs::read(&path).unwrap();
        content.truncate(content.len() - 30);
        fs::write(&path, content).unwrap();
        let error = reader.find_map(Result::err).unwrap();
        assert!(matches!(error, Error::InputChanged { .. }), "{error}");
        assert!(reader.next().is_none());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn damage_anywhere_is_an_error_or_goes_unseen(places in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let folder = tempfile::tempdir().unwrap();
        for (path, _) in files(&folder, 60, 20) {
            let mut content = fs::read(&path).unwrap();
            for (place, byte) in &places {
                let place = place.index(content.len());
                content[place] = *byte;
            }
            fs::write(&path, content).unwrap();
            let inputs = vec![path.to_str().unwrap().to_owned()];
            let read = Dataset::open(&DatasetOptions { inputs, ..DatasetOptions::default() }).and_then(|dataset| {
                let dataset = Arc::new(dataset);
                // A damaged count may promise more rows than a unit of 25 can count.
                let rows = unit_rows(dataset.total_rows(), Some(25));
                WindowReader::new(Arc::clone(&dataset), units(&dataset, rows), all(10))?.try_for_each(|window| window.map(drop))
            });
            if let Err(error) = read {
                prop_assert!(matches!(error.exit_code(), ExitCode::InputData | ExitCode::Usage), "{}", error);
            }
        }
    }
}

#[test]
fn damaged_pages_name_the_row_group() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    write_parquet(&path, &table(100), 50, 10);
    let mut content = fs::read(&path).unwrap();
    // The pages lie between the magic and the footer; the footer stays whole.
    let footer = content.len() - 8;
    let length = u32::from_le_bytes(content[footer..footer + 4].try_into().unwrap()) as usize;
    let pages = content.len() - 8 - length;
    content[4..pages / 4].fill(0xff);
    fs::write(&path, content).unwrap();
    let dataset = open(&path);
    let reader = WindowReader::new(Arc::clone(&dataset), units(&dataset, 50), all(30)).unwrap();
    let error = reader.collect::<Result<Vec<_>>>().unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::InputData);
    assert!(error.to_string().contains("row groups 0 to 1"), "{error}");
}
