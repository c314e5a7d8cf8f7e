//! Input that is damaged, foreign, hostile or merely odd: the file and the place in it are named, and nothing is committed that
//! was read from it.

use std::io::Write;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, AsArray, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::Schema;
use arrow::ipc::CompressionType;
use arrow::ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use super::support::*;

fn classify(scratch: &Scratch, input: &str, extra: &[&str]) -> std::process::Output {
    let (model, output) = (checkpoint("cls-nopad"), scratch.arg("out"));
    let _ = std::fs::remove_dir_all(&output);
    run(&[&["classify", "-i", input, "-o", &output, "--model", &model, "-q"], extra].concat())
}

/// What the program says of an input that it refuses, in one line, having committed nothing.
#[track_caller]
fn refused(scratch: &Scratch, code: i32, input: &str, says: &[&str]) -> String {
    let ended = classify(scratch, input, &[]);
    let message = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(code), "{input}: {message}");
    let message = message.strip_prefix("error: ").unwrap_or_else(|| panic!("{message}")).trim_end();
    assert_eq!(message.lines().count(), 1, "{message}");
    for says in says {
        assert!(message.contains(says), "{input}: '{says}' is not in: {message}");
    }
    assert!(!scratch.path("out/_SUCCESS.json").exists() && !scratch.path("out/part-000000.parquet").exists());
    message.to_owned()
}

fn table(rows: usize) -> RecordBatch {
    let texts: StringArray = (0..rows).map(|row| (row % 5 != 3).then(|| format!("text number {row}"))).collect();
    RecordBatch::try_from_iter_with_nullable(vec![
        ("id", Arc::new(Int64Array::from_iter_values(0..rows as i64)) as ArrayRef, false),
        ("text", Arc::new(texts) as ArrayRef, true),
    ])
    .unwrap()
}

/// The bytes of the table in a format, Parquet in row groups of 50 rows.
fn encoded(extension: &str, rows: usize) -> Vec<u8> {
    let table = table(rows);
    let mut bytes = Vec::new();
    match extension {
        "parquet" => {
            let properties = WriterProperties::builder().set_max_row_group_row_count(Some(50)).build();
            let mut writer = ArrowWriter::try_new(&mut bytes, table.schema(), Some(properties)).unwrap();
            writer.write(&table).unwrap();
            writer.close().unwrap();
        }
        "arrow" => {
            let mut writer = FileWriter::try_new(&mut bytes, &table.schema()).unwrap();
            writer.write(&table).unwrap();
            writer.finish().unwrap();
        }
        "arrows" => {
            let mut writer = StreamWriter::try_new(&mut bytes, &table.schema()).unwrap();
            writer.write(&table).unwrap();
            writer.finish().unwrap();
        }
        "csv" => arrow::csv::Writer::new(&mut bytes).write(&table).unwrap(),
        "jsonl" => arrow::json::LineDelimitedWriter::new(&mut bytes).write(&table).unwrap(),
        other => panic!("{other}"),
    }
    bytes
}

#[test]
fn truncated_empty_and_foreign_files_are_named() {
    let scratch = Scratch::new();
    for extension in ["parquet", "arrow", "arrows"] {
        let bytes = encoded(extension, 200);
        for (name, content) in [
            ("truncated", &bytes[..bytes.len() * 2 / 3]),
            ("short", &bytes[..5]),
            ("empty", &[]),
            ("foreign", &b"%PDF-1.4 these are no columns, and no magic of any format that is read"[..]),
        ] {
            let name = format!("{name}.{extension}");
            let input = scratch.write(&name, content);
            refused(&scratch, 65, &input, &[&name]);
        }
    }
    // A line is a row: what is cut off in its middle is damage that can be placed.
    let bytes = encoded("jsonl", 200);
    let input = scratch.write("truncated.jsonl", &bytes[..bytes.len() - 5]);
    refused(&scratch, 65, &input, &["truncated.jsonl, line 200"]);
    let input = scratch.write("foreign.jsonl", "%PDF-1.4\n");
    refused(&scratch, 65, &input, &["foreign.jsonl, line 1"]);
    let input = scratch.write("quote.csv", "id,text\n1,\"never closed\n2,b\n");
    refused(&scratch, 65, &input, &["quote.csv, line 2", "ends within a quoted cell"]);
    let input = scratch.write("fields.csv", "id,text\n1,a\n2,b,c\n");
    refused(&scratch, 65, &input, &["fields.csv, line 3"]);
    for name in ["empty.csv", "empty.jsonl"] {
        let input = scratch.write(name, "");
        let message = String::from_utf8(classify(&scratch, &input, &[]).stderr).unwrap();
        assert!(message.contains(name) && message.contains("'text'"), "{message}");
    }
}

#[test]
fn text_that_is_no_utf8_is_placed() {
    let scratch = Scratch::new();
    let input = scratch.write("latin.csv", b"id,text\n1,fine\n2,caf\xe9\n");
    refused(&scratch, 65, &input, &["latin.csv", "UTF-8"]);
    let input = scratch.write("latin.jsonl", b"{\"text\": \"fine\"}\n{\"text\": \"caf\xe9\"}\n");
    refused(&scratch, 65, &input, &["latin.jsonl, line 2"]);
    // In Parquet the type says that it is text, and nothing but the bytes says that it is not.
    let mut bytes = encoded("parquet", 200);
    let place = bytes.windows(15).rposition(|window| window == b"text number 120").unwrap();
    bytes[place + 3] = 0xe9;
    let input = scratch.write("latin.parquet", bytes);
    refused(&scratch, 65, &input, &["latin.parquet, row groups 0 to 3"]);
}

#[test]
fn nul_null_and_ten_megabytes_are_rows_like_any_other() {
    let scratch = Scratch::new();
    let huge = "word ".repeat(2 << 20);
    let texts = [Some("a\0b"), None, Some(""), Some(&huge), Some("\u{feff}\u{202e}\u{0}"), Some("last")];
    let input = scratch.texts("odd.parquet", texts);
    let ended = classify(&scratch, &input, &[]);
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    let results = read_parquet(scratch.path("out"));
    assert_eq!(strings(&results, "text").iter().map(Option::as_deref).collect::<Vec<_>>(), texts);
    assert!(strings(&results, "error").iter().all(Option::is_none));
    assert_eq!(flags(&results, "truncated"), [false, false, false, true, false, false].map(Some));
    let labels = strings(&results, "predicted_label");
    assert!(labels.iter().enumerate().all(|(row, label)| label.is_some() == (row != 1)));
    // The same from text formats, where a NUL is written as an escape or as it is.
    let mut jsonl = std::fs::File::create(scratch.path("odd.jsonl")).unwrap();
    for text in texts {
        writeln!(jsonl, "{}", serde_json::json!({ "text": text })).unwrap();
    }
    let ended = classify(&scratch, &scratch.arg("odd.jsonl"), &[]);
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    let again = read_parquet(scratch.path("out"));
    assert_eq!(strings(&again, "text"), strings(&results, "text"));
    assert_eq!(floats(&again, "predicted_score"), floats(&results, "predicted_score"));
}

#[test]
fn a_page_or_buffer_that_claims_2_gib_is_not_allocated() {
    let scratch = Scratch::new();
    let column = table(50).project(&[1]).unwrap();
    let mut bytes = Vec::new();
    let zstd = Compression::ZSTD(ZstdLevel::try_new(1).unwrap());
    let properties = WriterProperties::builder().set_compression(zstd).set_dictionary_enabled(false).build();
    let mut writer = ArrowWriter::try_new(&mut bytes, column.schema(), Some(properties)).unwrap();
    writer.write(&column).unwrap();
    writer.close().unwrap();
    // After the magic: {1: page type, 2: uncompressed size, …}, numbers of seven bits a byte.
    assert_eq!((&bytes[..4], bytes[4], bytes[6]), (&b"PAR1"[..], 0x15, 0x15));
    let end = 7 + bytes[7..].iter().position(|byte| byte & 0x80 == 0).unwrap() + 1;
    bytes.splice(7..end, [0xfe, 0xff, 0xff, 0xff, 0x0f]);
    let input = scratch.write("page.parquet", bytes);
    refused(&scratch, 65, &input, &["page.parquet, row group 0", "2147483647 bytes"]);

    for (name, compression) in [("zstd.arrow", CompressionType::ZSTD), ("lz4.arrow", CompressionType::LZ4_FRAME)] {
        let mut bytes = Vec::new();
        let options = IpcWriteOptions::default().try_with_compression(Some(compression)).unwrap();
        let repeated = Arc::new(StringArray::from(vec!["the same text again and again"; 500])) as ArrayRef;
        let batch = RecordBatch::try_from_iter([("text", repeated)]).unwrap();
        let mut writer = FileWriter::try_new_with_options(&mut bytes, &batch.schema(), options).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        let unpacked = (500 * "the same text again and again".len() as u64).to_le_bytes();
        // The last of them: before it, the offsets end with the same number.
        let place = bytes.windows(8).rposition(|window| window == unpacked).unwrap();
        bytes[place..place + 8].copy_from_slice(&(1u64 << 31).to_le_bytes());
        let input = scratch.write(name, bytes);
        refused(&scratch, 65, &input, &[name, "2147483648 bytes"]);
    }
}

/// A Parquet file with this footer and nothing else.
fn footer_only(footer: &[u8]) -> Vec<u8> {
    [&b"PAR1"[..], footer, &(footer.len() as u32).to_le_bytes(), b"PAR1"].concat()
}

#[test]
fn a_footer_that_claims_more_than_it_holds_is_refused() {
    let scratch = Scratch::new();
    // {1: version 1, 2: [{4: "r", 5: 0 columns}], 3: 0 rows, 4: a list of 2^31 - 1 row groups
    let groups = [&[0x15, 2, 0x19, 0x1c, 0x48, 1, b'r', 0x15, 0, 0, 0x16, 0, 0x19, 0xfc][..], &[255, 255, 255, 255, 7]];
    let input = scratch.write("groups.parquet", footer_only(&groups.concat()));
    refused(&scratch, 65, &input, &["groups.parquet", "2147483647 entries"]);
    // A group in a group in a group: {3: optional, 4: "g", 5: 1 column}.
    let depth = 100_000u32;
    let mut deep = vec![0x15, 2, 0x19, 0xfc];
    deep.extend([depth & 0x7f | 0x80, depth >> 7 & 0x7f | 0x80, depth >> 14].map(|byte| byte as u8));
    deep.extend([0x35, 2, 0x18, 1, b'g', 0x15, 2, 0].repeat(depth as usize));
    deep.extend([0x16, 0, 0x19, 0x0c, 0]);
    let input = scratch.write("deep.parquet", footer_only(&deep));
    refused(&scratch, 65, &input, &["deep.parquet", "nested deeper"]);
}

#[test]
fn files_that_disagree_are_both_named_with_their_types() {
    let scratch = Scratch::new();
    scratch.texts("drift/a.parquet", [Some("a")]);
    scratch.parquet("drift/b.parquet", vec![("text", Arc::new(Int64Array::from(vec![1])))]);
    refused(&scratch, 65, &scratch.arg("drift"), &["a.parquet", "b.parquet", "Utf8", "Int64", "'text'"]);
}

#[test]
fn a_file_that_is_replaced_while_it_is_read_ends_the_job() {
    let scratch = Scratch::new();
    let texts: Vec<String> = (0..20_000).map(|row| format!("some words of row {row}")).collect();
    let input = scratch.texts("in.parquet", texts.iter().map(|text| Some(text.as_str())));
    let (model, output) = (checkpoint("cls-window-sharded"), scratch.arg("out"));
    let args = ["classify", "-i", &input, "-o", &output, "--model", &model, "--unit-rows", "200", "-q"];
    let child = program(&args).stderr(Stdio::piped()).spawn().unwrap();
    wait_for(&scratch.path("out/part-000001.parquet"));
    let other = scratch.texts("other.parquet", texts.iter().rev().map(|text| Some(text.as_str())));
    std::fs::rename(other, &input).unwrap();
    let ended = child.wait_with_output().unwrap();
    let message = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(65), "{message}");
    assert!(message.contains("in.parquet: changed since") && message.contains("--overwrite"), "{message}");
    // What is there was read before: rows of the first file, in its order.
    let committed = strings(&read_parquet(&output), "text");
    assert!(committed.len() < texts.len() && !scratch.path("out/_SUCCESS.json").exists());
    assert!(committed.iter().zip(&texts).all(|(found, text)| found.as_ref() == Some(text)));
    fail(65, &[&args[..], &["--resume"]].concat());
}

fn wait_for(path: &Path) {
    let started = Instant::now();
    while !path.exists() {
        assert!(started.elapsed() < Duration::from_secs(60), "{} did not appear", path.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_column_without_any_member_can_be_read_and_not_written() {
    let scratch = Scratch::new();
    let input = scratch.write("in.jsonl", "{\"text\": \"a\", \"extra\": {}}\n{\"text\": \"b\", \"extra\": {}}\n");
    refused(&scratch, 64, &input, &["'extra'", "--keep"]);
    let ended = classify(&scratch, &input, &["--keep", "text"]);
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    assert_eq!(strings(&read_parquet(scratch.path("out")), "text").len(), 2);
}

/// A safetensors file: its header's length, the header, and some bytes of data.
fn safetensors(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
}

#[test]
fn hostile_checkpoints_are_refused_before_anything_is_believed() {
    let scratch = Scratch::new();
    let input = scratch.texts("in.parquet", [Some("a")]);
    let output = scratch.arg("out");
    let refuse = |model: &Path, says: &[&str]| {
        let message = fail(78, &["classify", "-i", &input, "-o", &output, "--model", model.to_str().unwrap()]);
        for says in says {
            assert!(message.contains(says), "'{says}' is not in: {message}");
        }
        assert!(!scratch.path("out").exists());
    };
    let copy = scratch.checkpoint("cls-nopad");
    let weights = copy.join("model.safetensors");
    let tensor = |name: &str, from: usize, to: usize| {
        format!("\"{name}\":{{\"dtype\":\"F32\",\"shape\":[{}],\"data_offsets\":[{from},{to}]}}", (to - from) / 4)
    };
    for content in [
        // A header of 2^63 bytes, of more bytes than there are, and of none.
        [&(1u64 << 63).to_le_bytes()[..], b"{}"].concat(),
        [&1000u64.to_le_bytes()[..], b"{}"].concat(),
        vec![0; 8],
        vec![0; 3],
        safetensors(&format!("{{{},{}}}", tensor("a", 0, 16), tensor("b", 8, 24)), 24),
        safetensors(&format!("{{{}}}", tensor("a", 0, 1 << 40)), 16),
        safetensors("{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296,4],\"data_offsets\":[0,16]}}", 16),
        safetensors(&"[".repeat(100_000), 0),
        safetensors("{\"a\": 7}", 0),
    ] {
        std::fs::write(&weights, content).unwrap();
        refuse(&copy, &["model.safetensors"]);
    }
    std::fs::remove_file(&weights).unwrap();
    let index = copy.join("model.safetensors.index.json");
    for file in ["../secret.safetensors", "/etc/passwd", "..", "", "a/../../b.safetensors"] {
        std::fs::write(&index, serde_json::json!({ "weight_map": { "a": file } }).to_string()).unwrap();
        refuse(&copy, &["model.safetensors.index.json", "not a file name in this folder"]);
    }
    std::fs::remove_file(&index).unwrap();
    std::fs::write(copy.join("pytorch_model.bin"), b"\x80\x02ctorch._utils").unwrap();
    refuse(&copy, &["pytorch_model.bin", "pickle"]);

    let copy = scratch.checkpoint("cls-multilabel-bf16");
    let weights = copy.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let end = bytes.len();
    bytes[end - 2..].copy_from_slice(&[0xc0, 0x7f]); // a NaN in bfloat16
    std::fs::write(&weights, bytes).unwrap();
    refuse(&copy, &["model.safetensors", "NaN"]);

    let copy = scratch.checkpoint("cls-window-sharded");
    let config = copy.join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    for (name, value) in [
        ("hidden_size", "18446744073709551615"),
        ("num_hidden_layers", "1000000000000"),
        ("vocab_size", "0"),
        ("num_attention_heads", "0"),
        ("num_key_value_heads", "3"),
        ("rms_norm_eps", "\"much\""),
    ] {
        let mut edited: serde_json::Value = serde_json::from_str(&text).unwrap();
        edited[name] = serde_json::from_str(value).unwrap();
        std::fs::write(&config, edited.to_string()).unwrap();
        refuse(&copy, &[]);
    }
    std::fs::write(&config, "[".repeat(100_000)).unwrap();
    refuse(&copy, &["config.json"]);
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let copy = scratch.checkpoint("cls-nopad");
        std::fs::write(copy.join(name), "[".repeat(100_000)).unwrap();
        refuse(&copy, &[name]);
    }
}

#[test]
fn a_template_that_does_not_end_fails_its_rows_and_not_the_job() {
    let scratch = Scratch::new();
    let input = scratch.write("in.jsonl", "{\"chat\": [{\"role\": \"user\", \"content\": \"hi\"}]}\n".repeat(3));
    for (index, (template, says)) in [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "did not end within"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursi"),
        ("{{ raise_exception('no chats today') }}", "no chats today"),
        ("{% include '/etc/passwd' %}", ""),
    ]
    .into_iter()
    .enumerate()
    {
        let copy = scratch.checkpoint("lm-window");
        std::fs::write(copy.join("chat_template.jinja"), template).unwrap();
        let output = scratch.arg(&format!("out-{index}"));
        let args = ["generate", "-i", &input, "--chat-column", "chat", "--max-tokens", "2", "-o", &output, "--model"];
        let started = Instant::now();
        succeed(&[&args[..], &[copy.to_str().unwrap()]].concat());
        assert!(started.elapsed() < Duration::from_secs(30), "{template}");
        let results = read_parquet(&output);
        assert_eq!(results.num_rows(), 3);
        for error in strings(&results, "error") {
            let error = error.unwrap_or_else(|| panic!("{template}: no error"));
            assert!(error.contains(says) && error.lines().count() == 1, "{template}: {error}");
        }
    }
}

#[test]
fn rows_that_fail_say_why_in_one_line_and_the_rest_goes_on() {
    let scratch = Scratch::new();
    // Too long, a chat that is none, a template that refuses: one row each among good ones.
    let chat = |content: &str| format!("[{{\"role\": \"user\", \"content\": \"{content}\"}}]");
    let rows = [
        Some(chat("hi")),
        Some(chat(&"much too long ".repeat(60))),
        Some("no chat at all".to_owned()),
        None,
        Some("[{\"role\": \"user\"}]".to_owned()),
        Some(chat("bye")),
    ];
    let chats: StringArray = rows.iter().map(Option::as_deref).collect();
    let input = scratch.parquet("in.parquet", vec![("chat", Arc::new(chats))]);
    let (model, output) = (checkpoint("lm-window"), scratch.arg("out"));
    let args =
        ["generate", "-i", &input, "--chat-column", "chat", "--max-tokens", "2", "--model", &model, "-o", &output];
    let summary = succeed(&[&args[..], &["--max-length", "60", "--overflow", "error"]].concat());
    let results = read_parquet(&output);
    let (errors, completions) = (strings(&results, "error"), strings(&results, "completion"));
    let failed: Vec<usize> = (0..rows.len()).filter(|&row| errors[row].is_some()).collect();
    assert!(failed.contains(&1) && failed.contains(&2), "{errors:?}");
    assert!(summary.contains(&format!("6 rows in, 6 rows out: {} failed", failed.len())), "{summary}");
    assert!(errors[1].as_ref().unwrap().contains("over the limit"), "{errors:?}");
    for row in 0..rows.len() {
        assert_eq!(completions[row].is_some(), errors[row].is_none() && row != 3, "row {row}: {errors:?}");
        assert!(errors[row].as_ref().is_none_or(|error| error.lines().count() == 1), "{errors:?}");
    }
    assert!(errors[0].is_none() && errors[3].is_none() && errors[5].is_none());
    let message = fail(65, &[&args[..args.len() - 1], &[&scratch.arg("none"), "--on-error", "fail"]].concat());
    assert!(message.contains("row 2 of"), "{message}");
    let schema: &Schema = &results.schema();
    assert!(schema.column_with_name("finish_reason").is_some());
    assert!(results.column_by_name("error").unwrap().as_string::<i32>().iter().flatten().all(|text| !text.is_empty()));
}
