use std::fs;

use arrow::array::{Array, Int32Array, Int64Array, ListArray, RecordBatch, StringArray};
use arrow::datatypes::{Int32Type, TimeUnit};
use tempfile::TempDir;

use super::*;
use crate::data::source::tests::{read_all, write_arrow_file, write_arrow_stream, write_parquet};
use crate::error::ExitCode;

fn options(folder: &TempDir, inputs: &[&str]) -> DatasetOptions {
    let inputs = inputs.iter().map(|input| folder.path().join(input).to_str().unwrap().to_owned()).collect();
    DatasetOptions { inputs, ..DatasetOptions::default() }
}

fn open(folder: &TempDir, inputs: &[&str]) -> Result<Dataset> {
    Dataset::open(&options(folder, inputs))
}

fn write(folder: &TempDir, name: &str, content: impl AsRef<[u8]>) {
    let path = folder.path().join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn texts<'a>(batch: &'a RecordBatch, column: &str) -> Vec<Option<&'a str>> {
    let column = batch.column_by_name(column).unwrap();
    column.as_any().downcast_ref::<StringArray>().unwrap().iter().collect()
}

fn integers(batch: &RecordBatch, column: &str) -> Vec<Option<i64>> {
    let column = batch.column_by_name(column).unwrap();
    column.as_any().downcast_ref::<Int64Array>().unwrap().iter().collect()
}

fn batch(columns: Vec<(&str, arrow::array::ArrayRef)>) -> RecordBatch {
    RecordBatch::try_from_iter(columns).unwrap()
}

fn message(result: Result<Dataset>, code: ExitCode) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.exit_code(), code, "{error}");
    error.to_string()
}

#[test]
fn columns_are_matched_by_name_over_all_formats() {
    let folder = tempfile::tempdir().unwrap();
    let id = |n: i64| Arc::new(Int64Array::from(vec![n])) as arrow::array::ArrayRef;
    let text = |t: &str| Arc::new(StringArray::from(vec![t])) as arrow::array::ArrayRef;
    write_parquet(&folder.path().join("a.parquet"), &batch(vec![("id", id(1)), ("text", text("a"))]), 10, 1024);
    write_arrow_file(&folder.path().join("b.arrow"), &[batch(vec![("text", text("b")), ("id", id(2))])]);
    write_arrow_stream(&folder.path().join("c.arrows"), &[batch(vec![("text", text("c")), ("id", id(3))])]);
    write(&folder, "d.csv", "text,id\nd,4\n");
    write(&folder, "e.tsv", "id\ttext\n5\te\n");
    write(&folder, "f.jsonl", "{\"text\": \"f\", \"id\": 6}\n");
    write(&folder, "g.csv", "");
    let dataset = open(&folder, &["."]).unwrap();
    assert_eq!(dataset.files.len(), 7);
    assert_eq!(dataset.total_rows(), 6);
    let names: Vec<&String> = dataset.schema.fields().iter().map(|field| field.name()).collect();
    assert_eq!(names, ["id", "text"]);
    assert!(dataset.schema.metadata().is_empty());
    let all = read_all(&Arc::new(dataset));
    assert_eq!(integers(&all, "id"), (1..7).map(Some).collect::<Vec<_>>());
    assert_eq!(texts(&all, "text"), ["a", "b", "c", "d", "e", "f"].map(Some));
}

#[test]
fn hive_folders_become_typed_columns() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder, "year=2024/code=01/a.csv", "x\n1\n");
    write(&folder, "year=__HIVE_DEFAULT_PARTITION__/code=b/a.csv", "x\n2\n3\n");
    let dataset = open(&folder, &["."]).unwrap();
    assert_eq!(dataset.partition_columns, 2);
    assert_eq!(dataset.schema.field(1), &Field::new("year", DataType::Int64, true));
    assert_eq!(dataset.schema.field(2), &Field::new("code", DataType::Utf8, false));
    let all = read_all(&Arc::new(dataset));
    assert_eq!(integers(&all, "year"), [Some(2024), None, None]);
    assert_eq!(texts(&all, "code"), [Some("01"), Some("b"), Some("b")]);

    write(&folder, "b.csv", "x\n1\n");
    let error = message(open(&folder, &["."]), ExitCode::InputData);
    assert!(error.contains("'year'") && error.contains("missing") && error.contains("b.csv"), "{error}");
    write(&folder, "other/x=1/a.csv", "x\n1\n");
    assert!(message(open(&folder, &["other"]), ExitCode::Usage).contains("'x'"));
}

#[test]
fn drift_names_both_files_and_types() {
    let folder = tempfile::tempdir().unwrap();
    let column = |name: &str, array: arrow::array::ArrayRef| batch(vec![(name, array)]);
    write_parquet(&folder.path().join("a.parquet"), &column("x", Arc::new(Int64Array::from(vec![1]))), 9, 99);
    write_parquet(&folder.path().join("b.parquet"), &column("x", Arc::new(Int32Array::from(vec![1]))), 9, 99);
    write_parquet(&folder.path().join("c.parquet"), &column("y", Arc::new(Int64Array::from(vec![1]))), 9, 99);
    let error = message(open(&folder, &["a.parquet", "b.parquet"]), ExitCode::InputData);
    for wanted in ["a.parquet", "b.parquet", "'x'", "Int64", "Int32"] {
        assert!(error.contains(wanted), "{error}");
    }
    assert!(message(open(&folder, &["a.parquet", "c.parquet"]), ExitCode::InputData).contains("missing"));
    write(&folder, "a.jsonl", "{\"x\": [1]}\n");
    write(&folder, "b.jsonl", "{\"x\": {\"y\": 1}}\n");
    let error = message(open(&folder, &["a.jsonl", "b.jsonl"]), ExitCode::InputData);
    assert!(error.contains("a.jsonl") && error.contains("b.jsonl") && error.contains("a list"), "{error}");
}

#[test]
fn nullability_widens_and_list_items_may_be_named_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    let lists = ListArray::from_iter_primitive::<Int32Type, _, _>([Some(vec![Some(1)]), Some(vec![])]);
    let (_, offsets, values, _) = lists.into_parts();
    let write_list = |name: &str, item: Field, nullable: bool| {
        let array = ListArray::new(Arc::new(item), offsets.clone(), values.clone(), None);
        let schema = Schema::new(vec![Field::new("l", array.data_type().clone(), nullable)]);
        write_arrow_file(
            &folder.path().join(name),
            &[RecordBatch::try_new(Arc::new(schema), vec![Arc::new(array)]).unwrap()],
        );
    };
    write_list("a.arrow", Field::new("item", DataType::Int32, false), false);
    write_list("b.arrow", Field::new("element", DataType::Int32, true), true);
    let dataset = open(&folder, &["."]).unwrap();
    let item = Arc::new(Field::new("item", DataType::Int32, true));
    assert_eq!(dataset.schema.field(0), &Field::new("l", DataType::List(item), true));
    assert_eq!(read_all(&Arc::new(dataset)).num_rows(), 4);
}

#[test]
fn csv_types_come_from_all_rows_of_all_files() {
    let folder = tempfile::tempdir().unwrap();
    write(
        &folder,
        "a.csv",
        "\u{feff}id,n,note,when,zip\r\n1,1,\"two\nlines, and \"\"quotes\"\"\",2026-01-31,01234\r\n",
    );
    write(&folder, "b.csv", "n,id,when,note,zip\n2.5,7,2026-01-31T10:00:00,12,99\n\n,8,,,\n");
    let mut options = options(&folder, &["*.csv"]);
    options.text_columns = vec!["id".to_owned()];
    let dataset = Dataset::open(&options).unwrap();
    let types: Vec<(&str, &DataType)> =
        dataset.schema.fields().iter().map(|field| (field.name().as_str(), field.data_type())).collect();
    let stamp = DataType::Timestamp(TimeUnit::Second, None);
    let (text, float) = (DataType::Utf8, DataType::Float64);
    assert_eq!(types, [("id", &text), ("n", &float), ("note", &text), ("when", &stamp), ("zip", &text)]);
    let all = read_all(&Arc::new(dataset));
    assert_eq!(texts(&all, "id"), [Some("1"), Some("7"), Some("8")]);
    assert_eq!(texts(&all, "note"), [Some("two\nlines, and \"quotes\""), Some("12"), None]);
    assert_eq!(texts(&all, "zip"), [Some("01234"), Some("99"), None]);
}

#[test]
fn bad_text_files_name_the_line() {
    let folder = tempfile::tempdir().unwrap();
    for (name, content, wanted) in [
        ("ragged.csv", b"a,b\n1,2\n\"x\ny\",3\n4\n".as_slice(), "line 5"),
        ("latin.csv", b"a,b\n1,2\n1,K\xf6ln\n", "line 3"),
        ("bad.jsonl", b"{\"a\": 1}\n\n{\"a\": }\n", "line 3"),
        ("list.jsonl", b"{\"a\": 1}\n[1]\n", "line 2"),
        ("latin.jsonl", b"{\"a\": \"K\xf6ln\"}\n", "line 1"),
    ] {
        write(&folder, name, content);
        let error = message(open(&folder, &[name]), ExitCode::InputData);
        assert!(error.contains(name) && error.contains(wanted), "{error}");
    }
    write(&folder, "twice.csv", "a,a\n1,2\n");
    assert!(message(open(&folder, &["twice.csv"]), ExitCode::Usage).contains("'a'"));
}

#[test]
fn json_lines_skip_blank_lines_and_the_byte_order_mark() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder, "a.jsonl", "\u{feff}{\"b\": \"x\", \"a\": null}\r\n\r\n  \n{\"a\": 2, \"b\": true}");
    write(&folder, "b.jsonl", "\n\n{\"c\": [{\"d\": 1}]}\n\n");
    let dataset = Arc::new(open(&folder, &["*.jsonl"]).unwrap());
    assert_eq!(dataset.files.iter().map(|file| file.rows).collect::<Vec<_>>(), [2, 1]);
    let all = read_all(&dataset);
    let names: Vec<&String> = all.schema_ref().fields().iter().map(|field| field.name()).collect();
    assert_eq!(names, ["b", "a", "c"]);
    assert_eq!(texts(&all, "b"), [Some("x"), Some("true"), None]);
    assert_eq!(integers(&all, "a"), [None, Some(2), None]);
}

#[test]
fn damaged_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let rows = batch(vec![("x", Arc::new(Int64Array::from_iter_values(0..1000)) as _)]);
    write_parquet(&folder.path().join("a.parquet"), &rows, 100, 100);
    write_arrow_file(&folder.path().join("a.arrow"), &[rows.clone(), rows.clone()]);
    write_arrow_stream(&folder.path().join("b.arrow"), &[rows.clone(), rows]);
    for name in ["a.parquet", "a.arrow", "b.arrow"] {
        let whole = fs::read(folder.path().join(name)).unwrap();
        // 20 bytes off a stream cut its end marker and a part of its last body.
        for keep in [0, 3, 9, whole.len() / 2, whole.len() - 20] {
            write(&folder, &format!("cut-{name}"), &whole[..keep]);
            let error = message(open(&folder, &[&format!("cut-{name}")]), ExitCode::InputData);
            assert!(error.contains(&format!("cut-{name}")), "{error}");
        }
        write(&folder, &format!("noise-{name}"), vec![0x5a; 500]);
        message(open(&folder, &[&format!("noise-{name}")]), ExitCode::InputData);
    }
}

#[test]
fn changes_and_missing_columns_are_told() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder, "a.csv", "text,b\nx,1\n");
    let dataset = open(&folder, &["a.csv"]).unwrap();
    dataset.verify_unchanged(0).unwrap();
    assert_eq!(dataset.column("text", "--text-column").unwrap().data_type(), &DataType::Utf8);
    let error = dataset.column("texts", "--text-column").unwrap_err().to_string();
    assert!(error.contains("did you mean 'text'?") && error.contains("--text-column"), "{error}");
    let stamp = dataset.files[0].stamp();
    let copy: FileStamp = serde_json::from_str(&serde_json::to_string(&stamp).unwrap()).unwrap();
    assert_eq!(copy, stamp);
    write(&folder, "a.csv", "text,b\nx,1\ny,2\n");
    assert_eq!(dataset.verify_unchanged(0).unwrap_err().exit_code(), ExitCode::InputData);
    fs::remove_file(folder.path().join("a.csv")).unwrap();
    assert!(dataset.verify_unchanged(0).unwrap_err().to_string().contains("gone"));
}

#[test]
fn an_empty_dataset_has_a_schema() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder, "a.csv", "text,b\n");
    write(&folder, "b.jsonl", "");
    let dataset = open(&folder, &["a.csv", "b.jsonl"]).unwrap();
    assert_eq!((dataset.total_rows(), dataset.schema.fields().len()), (0, 2));
    write(&folder, "none.parquet", "");
    message(open(&folder, &["none.parquet"]), ExitCode::InputData);
}
