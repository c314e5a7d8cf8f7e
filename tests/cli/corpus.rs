//! Thousands of damaged files, read in a child process with little memory: every one is an error that names it or goes unseen.
//! None ends the process, none is allocated for beyond what it is worth, none is read for ever.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{
    ArrayRef, BooleanArray, DictionaryArray, FixedSizeBinaryArray, Float64Array, Int64Array, ListBuilder, RecordBatch,
    StringArray, StringBuilder, StringViewArray, StructArray,
};
use arrow::datatypes::{DataType, Field, Int32Type};
use arrow::ipc::CompressionType;
use arrow::ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};
use mistral_batch::data::dataset::{Dataset, DatasetOptions};
use mistral_batch::data::source::{WindowOptions, WindowReader};
use mistral_batch::data::units::{cut_units, unit_rows};
use mistral_batch::{Error, ExitCode};
use parquet::arrow::ArrowWriter;
use parquet::basic::{BrotliLevel, Compression, Encoding, GzipLevel, ZstdLevel};
use parquet::file::properties::{WriterProperties, WriterVersion};

use super::support::Scratch;

/// What the child may map: the program's own threads and code, and a page or two as large as pages may be.
const MEMORY_KIB: u64 = 1 << 20;
const SECONDS_A_FILE: u64 = 10;
const ROWS: usize = 60;

/// A small generator that needs no state but a number, so that a file is found again by its number.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// Rows of every kind of column that has a decoder of its own, some of them null.
fn table() -> RecordBatch {
    let text = |row: usize| (row % 5 != 3).then(|| format!("row {} {}", row % 7, "ü, \"x\"\n".repeat(row % 4)));
    let texts: Vec<Option<String>> = (0..ROWS).map(text).collect();
    let mut tags = ListBuilder::new(StringBuilder::new());
    for row in 0..ROWS {
        match row % 3 {
            0 => tags.append_null(),
            count => tags.append_value((0..count).map(|tag| Some(format!("t{tag}")))),
        }
    }
    let plain: ArrayRef = Arc::new(StringArray::from(texts.clone()));
    let flags: ArrayRef = Arc::new(BooleanArray::from_iter((0..ROWS).map(|row| Some(row % 2 == 0))));
    let object = StructArray::from(vec![
        (Arc::new(Field::new("role", DataType::Utf8, true)), Arc::clone(&plain)),
        (Arc::new(Field::new("sure", DataType::Boolean, true)), Arc::clone(&flags)),
    ]);
    let keys = (0..ROWS).map(|row| (row % 4 != 0).then_some([row as u8; 5]));
    RecordBatch::try_from_iter_with_nullable(vec![
        ("id", Arc::new(Int64Array::from_iter_values(0..ROWS as i64)) as ArrayRef, false),
        ("text", plain, true),
        ("view", Arc::new(StringViewArray::from_iter(texts)), true),
        (
            "label",
            Arc::new((0..ROWS).map(|row| Some(["a", "b"][row % 2])).collect::<DictionaryArray<Int32Type>>()),
            true,
        ),
        ("weight", Arc::new(Float64Array::from_iter_values((0..ROWS).map(|row| row as f64 / 2.0))), true),
        ("key", Arc::new(FixedSizeBinaryArray::try_from_sparse_iter_with_size(keys, 5).unwrap()), true),
        ("sure", flags, true),
        ("tags", Arc::new(tags.finish()), true),
        ("object", Arc::new(object), true),
    ])
    .unwrap()
}

/// The table in every format that has a structure to damage: encodings, compressions and page versions of Parquet, and Arrow
/// files and streams, compressed or not.
fn seeds() -> Vec<(String, Vec<u8>)> {
    let table = table();
    let mut seeds = Vec::new();
    let compressions = [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::BROTLI(BrotliLevel::default()),
        Compression::LZ4_RAW,
        Compression::ZSTD(ZstdLevel::default()),
    ];
    let encodings = [
        ("dictionary", None),
        ("plain", Some((Encoding::PLAIN, Encoding::PLAIN, Encoding::PLAIN))),
        ("delta", Some((Encoding::DELTA_BINARY_PACKED, Encoding::PLAIN, Encoding::BYTE_STREAM_SPLIT))),
        ("lengths", Some((Encoding::DELTA_BINARY_PACKED, Encoding::DELTA_LENGTH_BYTE_ARRAY, Encoding::PLAIN))),
        ("prefixes", Some((Encoding::DELTA_BINARY_PACKED, Encoding::DELTA_BYTE_ARRAY, Encoding::PLAIN))),
        ("split", Some((Encoding::BYTE_STREAM_SPLIT, Encoding::PLAIN, Encoding::PLAIN))),
    ];
    for compression in compressions {
        for version in [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0] {
            for (name, encoding) in encodings {
                let mut properties = WriterProperties::builder()
                    .set_compression(compression)
                    .set_writer_version(version)
                    .set_max_row_group_row_count(Some(40))
                    .set_data_page_row_count_limit(20)
                    .set_write_batch_size(10);
                if let Some((integers, texts, floats)) = encoding {
                    properties = properties.set_dictionary_enabled(false);
                    for (column, encoding) in [
                        ("id", integers),
                        ("text", texts),
                        ("view", texts),
                        ("weight", floats),
                        ("key", Encoding::PLAIN),
                    ] {
                        properties = properties.set_column_encoding(column.into(), encoding);
                    }
                }
                let mut bytes = Vec::new();
                let mut writer = ArrowWriter::try_new(&mut bytes, table.schema(), Some(properties.build())).unwrap();
                writer.write(&table).unwrap();
                writer.close().unwrap();
                seeds.push((format!("{name}-{compression:?}-{version:?}.parquet"), bytes));
            }
        }
    }
    for compression in [None, Some(CompressionType::LZ4_FRAME), Some(CompressionType::ZSTD)] {
        let options = IpcWriteOptions::default().try_with_compression(compression).unwrap();
        let mut bytes = Vec::new();
        let mut writer = FileWriter::try_new_with_options(&mut bytes, &table.schema(), options.clone()).unwrap();
        (0..3).for_each(|piece| writer.write(&table.slice(piece * 20, 20)).unwrap());
        writer.finish().unwrap();
        seeds.push((format!("{compression:?}.arrow"), bytes));
        let mut bytes = Vec::new();
        let mut writer = StreamWriter::try_new_with_options(&mut bytes, &table.schema(), options).unwrap();
        (0..3).for_each(|piece| writer.write(&table.slice(piece * 20, 20)).unwrap());
        writer.finish().unwrap();
        seeds.push((format!("{compression:?}.arrows"), bytes));
    }
    seeds
}

/// Damages a file in one of the ways in which files are damaged, or are made to look whole.
fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    let parquet = bytes.starts_with(b"PAR1");
    let footer = match parquet {
        true => {
            let end = bytes.len() - 8;
            let length = u32::from_le_bytes(bytes[end..end + 4].try_into().unwrap()) as usize;
            // An earlier mutation may have damaged the length.
            end.checked_sub(length).filter(|&start| start < end).unwrap_or(end / 2)..end
        }
        false => bytes.len() * 3 / 4..bytes.len(),
    };
    let anywhere = 4..bytes.len();
    // The structure is where a few bytes do most.
    let range = if random.below(2) == 0 { footer } else { anywhere };
    let place = |random: &mut Random| range.start + random.below(range.len());
    match random.below(8) {
        0 => {
            for _ in 0..=random.below(8) {
                let place = place(random);
                bytes[place] ^= 1 << random.below(8);
            }
        }
        1 => {
            for _ in 0..=random.below(4) {
                let place = place(random);
                bytes[place] = [0, 0xff, 0x7f, 0x80, 1, 0xfe][random.below(6)];
            }
        }
        2 => bytes.truncate(random.below(bytes.len())),
        // The largest numbers of 32 and of 64 bits, seven bits a byte, in the place of what is there.
        3 | 4 => {
            let length = [5, 10][random.below(2)];
            let place = place(random);
            for (offset, byte) in bytes[place..].iter_mut().take(length).enumerate() {
                *byte = match offset + 1 == length {
                    true => [0x0f, 0x01][usize::from(length == 10)],
                    false => [0xff, 0xfe][usize::from(offset == 0 && random.below(2) == 0)],
                };
            }
        }
        5 => {
            // Little-endian counts and lengths, as levels, dictionaries and IPC have them.
            let place = place(random);
            let value = [i32::MAX as u32, u32::MAX, 1 << 28, 1 << 20, 0][random.below(5)];
            let end = (place + 4).min(bytes.len());
            bytes[place..end].copy_from_slice(&value.to_le_bytes()[..end - place]);
        }
        6 => {
            let (from, to) = (place(random), place(random));
            let length = random.below(64).min(bytes.len() - from.max(to));
            bytes.copy_within(from..from + length, to);
        }
        _ => {
            let place = place(random);
            match random.below(2) {
                0 => drop(bytes.drain(place..(place + 1 + random.below(9)).min(bytes.len()))),
                _ => {
                    let inserted: Vec<u8> = (0..=random.below(9)).map(|_| random.next() as u8).collect();
                    bytes.splice(place..place, inserted);
                }
            }
        }
    }
}

/// Reads the whole dataset as a job would.
fn read(path: &Path) -> Result<u64, Error> {
    let inputs = vec![path.to_str().unwrap().to_owned()];
    let dataset = Arc::new(Dataset::open(&DatasetOptions { inputs, ..DatasetOptions::default() })?);
    let file_rows: Vec<u64> = dataset.files.iter().map(|file| file.rows).collect();
    let units = cut_units(&file_rows, unit_rows(dataset.total_rows(), Some(25)), None);
    let options = WindowOptions { projection: None, window_rows: 10, window_bytes: 64 << 20 };
    let mut rows = 0;
    for window in WindowReader::new(dataset, units, options)? {
        rows += window?.batch.num_rows() as u64;
    }
    Ok(rows)
}

/// What the parent starts with `--ignored` in a process of its own.
#[test]
#[ignore = "run by the tests below, in a process with little memory"]
fn in_a_child() {
    let Ok(range) = std::env::var("CORPUS_FILES") else { return };
    let (start, end) = range.split_once("..").unwrap();
    let (start, end): (u64, u64) = (start.parse().unwrap(), end.parse().unwrap());
    let folder = std::env::var("CORPUS_FOLDER").unwrap();
    let folder = Path::new(&folder);
    let seeds = seeds();
    for (name, bytes) in &seeds {
        let path = folder.join(name);
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(read(&path).unwrap_or_else(|error| panic!("{name}: {error}")), ROWS as u64, "{name}");
    }
    // A decoder's panics become errors; what they print is of no use here.
    std::panic::set_hook(Box::new(|_| ()));
    let (mut unseen, mut told) = (0, 0);
    for number in start..end {
        let mut random = Random(number);
        let (name, bytes) = &seeds[(number % seeds.len() as u64) as usize];
        let mut bytes = bytes.clone();
        for _ in 0..=random.below(3) {
            if bytes.len() > 16 {
                mutate(&mut bytes, &mut random);
            }
        }
        // The file that is being read, should this process not come back from it.
        let path = folder.join(format!("current.{}", name.rsplit_once('.').unwrap().1));
        std::fs::write(folder.join("current-number"), number.to_string()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        let started = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| read(&path)));
        let wrong = match outcome {
            Err(_) => Some("a panic came through".to_owned()),
            Ok(_) if started.elapsed() > Duration::from_secs(SECONDS_A_FILE) => Some("took too long".to_owned()),
            Ok(Ok(_)) => {
                unseen += 1;
                None
            }
            Ok(Err(error)) => {
                told += 1;
                let names_it = error.to_string().contains("current.");
                let expected = matches!(error.exit_code(), ExitCode::InputData | ExitCode::Usage);
                (!expected || !names_it || error.to_string().lines().count() > 1).then(|| error.to_string())
            }
        };
        if let Some(wrong) = wrong {
            let _ = std::panic::take_hook();
            panic!("file {number}, made from {name}: {wrong}");
        }
        std::fs::remove_file(&path).unwrap();
    }
    println!("{told} files were refused, {unseen} read as if nothing were wrong");
    // Damage to values or to statistics is not to be seen; a corpus without errors would test nothing.
    assert!(told * 2 > end - start, "only {told} of {} files were refused", end - start);
}

fn read_damaged_files(start: u64, end: u64, limit: Duration) {
    let scratch = Scratch::new();
    let folder = scratch.path("");
    let test_program = std::env::current_exe().unwrap();
    // Every thread's arena would reserve address space of its own.
    let mut child = Command::new("sh")
        .args(["-c", "ulimit -v \"$0\" && exec \"$@\"", &MEMORY_KIB.to_string()])
        .arg(test_program)
        .args(["corpus::in_a_child", "--exact", "--ignored", "--nocapture", "--test-threads", "1"])
        .env("CORPUS_FILES", format!("{start}..{end}"))
        .env("CORPUS_FOLDER", &folder)
        .env("MALLOC_ARENA_MAX", "2")
        .env("RAYON_NUM_THREADS", "2")
        .stdout(File::create(folder.join("stdout")).unwrap())
        .stderr(File::create(folder.join("stderr")).unwrap())
        .spawn()
        .unwrap();
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if started.elapsed() > limit {
            child.kill().unwrap();
            child.wait().unwrap();
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let told = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
    println!(
        "{} in {:.1} s",
        told("stdout").lines().find(|line| line.contains("refused")).unwrap_or(""),
        started.elapsed().as_secs_f64()
    );
    assert!(
        status.is_some_and(|status| status.success()),
        "{status:?} at file {}: {} {}",
        told("current-number"),
        told("stdout"),
        told("stderr")
    );
}

#[test]
fn thousands_of_damaged_files_are_read_in_little_memory() {
    read_damaged_files(0, 6_000, Duration::from_secs(300));
}

#[test]
#[ignore = "takes minutes"]
fn hundreds_of_thousands_of_damaged_files_are_read_in_little_memory() {
    read_damaged_files(6_000, 400_000, Duration::from_secs(3600));
}
