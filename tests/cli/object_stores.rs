//! The program against a real object store: `MISTRAL_BATCH_TEST_STORE` is a URL such as `s3://bucket/prefix`, below which
//! everything may be written; endpoint and credentials are in the environment as the program wants them. The README says
//! how to start servers on this machine.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arrow::array::RecordBatch;
use futures::TryStreamExt;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt};

use super::support::*;

const NEEDS_STORE: &str = "MISTRAL_BATCH_TEST_STORE is not set: give it a URL such as s3://bucket/prefix";
const ROWS: usize = 2000;

/// A place of its own in the store, with a client of its own.
struct Bucket {
    url: String,
    store: Box<dyn ObjectStore>,
    prefix: Key,
    runtime: tokio::runtime::Runtime,
    scratch: Scratch,
}

impl Bucket {
    fn new(name: &str) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let root = std::env::var("MISTRAL_BATCH_TEST_STORE").expect(NEEDS_STORE);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let url = format!("{}/{name}-{now:x}-{count}", root.trim_end_matches('/'));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (store, prefix) = object_store::parse_url_opts(&url::Url::parse(&url).unwrap(), std::env::vars()).unwrap();
        Self { url, store, prefix, runtime, scratch: Scratch::new() }
    }

    fn url(&self, name: &str) -> String {
        format!("{}/{name}", self.url)
    }

    fn key(&self, name: &str) -> Key {
        Key::parse(format!("{}/{name}", self.prefix)).unwrap()
    }

    /// Copies a local file there and returns its URL.
    fn put(&self, name: &str, file: impl AsRef<Path>) -> String {
        let content = std::fs::read(file).unwrap();
        self.runtime.block_on(self.store.put(&self.key(name), content.into())).unwrap();
        self.url(name)
    }

    fn get(&self, name: &str) -> Vec<u8> {
        self.runtime.block_on(async { self.store.get(&self.key(name)).await.unwrap().bytes().await.unwrap() }).to_vec()
    }

    /// The etag, or else the time, of every object below a name.
    fn list(&self, name: &str) -> BTreeMap<String, String> {
        let key = self.key(name);
        let listed: Vec<_> = self.runtime.block_on(self.store.list(Some(&key)).try_collect()).unwrap();
        let identity =
            |meta: &object_store::ObjectMeta| meta.e_tag.clone().unwrap_or_else(|| meta.last_modified.to_rfc3339());
        listed.iter().map(|meta| (meta.location.filename().unwrap().to_owned(), identity(meta))).collect()
    }

    /// A copy of everything below a name, in a local folder.
    fn download(&self, name: &str) -> std::path::PathBuf {
        let folder = self.scratch.path(&format!("download-{}", name.replace('/', "-")));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        for file in self.list(name).keys() {
            std::fs::write(folder.join(file), self.get(&format!("{name}/{file}"))).unwrap();
        }
        folder
    }
}

fn strs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

/// A dataset, the command line that works on it, and its result on local files.
struct Job {
    bucket: Bucket,
    local_input: String,
    input: String,
    whole: RecordBatch,
}

impl Job {
    fn new(name: &str) -> Self {
        let bucket = Bucket::new(name);
        let texts: Vec<String> = (0..ROWS).map(|i| "some words ".repeat(1 + i * 13 % 17) + &i.to_string()).collect();
        let local_input = bucket.scratch.texts("in.parquet", texts.iter().map(|text| Some(text.as_str())));
        let input = bucket.put("in/in.parquet", &local_input);
        let mut job = Self {
            whole: RecordBatch::new_empty(arrow::datatypes::Schema::empty().into()),
            bucket,
            local_input,
            input,
        };
        let whole = job.bucket.scratch.arg("whole");
        succeed(&strs(&job.args(&job.local_input, &whole, &[])));
        job.whole = read_parquet(&whole);
        job
    }

    fn args(&self, input: &str, output: &str, extra: &[&str]) -> Vec<String> {
        let model = checkpoint("cls-window-sharded");
        let args = ["classify", "-i", input, "--model", &model, "--unit-rows", "200", "-q", "-o", output];
        args.iter().chain(extra).map(|arg| (*arg).to_owned()).collect()
    }

    fn assert_whole(&self, name: &str) {
        assert!(read_parquet(self.bucket.download(name)) == self.whole, "{name}: not the rows of a local run");
        let left: Vec<String> = self.bucket.list(name).into_keys().collect();
        assert_eq!(left.len(), ROWS / 200 + 2, "{name}: {left:?}");
    }
}

#[test]
#[ignore = "needs an object store"]
fn objects_in_and_out_are_the_same_as_files() {
    let job = Job::new("formats");
    let out = job.bucket.url("parts");
    succeed(&strs(&job.args(&job.input, &out, &[])));
    job.assert_whole("parts");
    assert!(succeed(&strs(&job.args(&job.input, &out, &[]))).is_empty(), "a finished output is left alone");
    // A prefix, a glob and a slash at the end name the same dataset.
    for (name, input) in [("prefix", "in"), ("glob", "in/*.parquet"), ("slash", "in/")] {
        succeed(&strs(&job.args(&job.bucket.url(input), &job.bucket.url(name), &[])));
        job.assert_whole(name);
    }
    succeed(&strs(&job.args(&job.input, &out, &["--overwrite"])));
    job.assert_whole("parts");
    fail(73, &strs(&job.args(&job.input, &out, &["--max-length", "64"])));
    fail(78, &strs(&job.args(&job.input, &out, &["--max-length", "64", "--resume"])));

    for ending in ["parquet", "arrow", "jsonl", "csv"] {
        let name = format!("single/out.{ending}");
        let local = job.bucket.scratch.arg(&format!("out.{ending}"));
        succeed(&strs(&job.args(&job.local_input, &local, &[])));
        succeed(&strs(&job.args(&job.input, &job.bucket.url(&name), &[])));
        let content = job.bucket.get(&name);
        match ending {
            "jsonl" | "csv" => assert!(content == std::fs::read(&local).unwrap(), "{ending}"),
            "parquet" => {
                let copy = job.bucket.scratch.write("copy.parquet", &content);
                assert!(read_parquet(copy) == job.whole);
            }
            _ => assert!(content.starts_with(b"ARROW1")),
        }
        assert!(job.bucket.list(&format!("single/.out.{ending}.mistral-batch")).is_empty(), "parts are left");
        succeed(&strs(&job.args(&job.input, &job.bucket.url(&name), &[])));
        // What was written can be read.
        let again = job.bucket.url(&format!("again-{ending}"));
        succeed(&strs(&job.args(&job.bucket.url(&name), &again, &["--keep", "text", "--prefix", "again_"])));
        assert_eq!(read_parquet(job.bucket.download(&format!("again-{ending}"))).num_rows(), ROWS);
    }
}

#[test]
#[ignore = "needs an object store"]
fn killed_runs_are_resumed_and_nothing_is_computed_twice() {
    let job = Job::new("kills");
    let started = Instant::now();
    succeed(&strs(&job.args(&job.input, &job.bucket.url("timed"), &[])));
    let whole_run = started.elapsed();
    let mut kills = 0;
    let mut state = 1u64;
    for round in 0..100 {
        let name = format!("killed-{round}");
        let out = job.bucket.url(&name);
        let mut before = BTreeMap::new();
        loop {
            let args = job.args(&job.input, &out, &["--resume"]);
            let mut child = program(&strs(&args)).stderr(Stdio::null()).spawn().unwrap();
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            std::thread::sleep(whole_run.mul_f64((state >> 40) as f64 / (1u64 << 24) as f64 * 0.9));
            child.kill().unwrap();
            let status = child.wait().unwrap();
            let now = job.bucket.list(&name);
            for (part, etag) in before.iter().filter(|(name, _): &(&String, _)| name.starts_with("part-")) {
                assert_eq!(now.get(part), Some(etag), "{name}: {part} was written again");
            }
            before = now;
            if status.success() {
                break;
            }
            kills += 1;
        }
        job.assert_whole(&name);
        if kills >= 20 {
            break;
        }
    }
    assert!(kills >= 20, "{kills}");
    for point in ["before-write", "after-write", "before-publish", "after-publish", "before-success"] {
        let out = job.bucket.url(point);
        let times = if point == "before-success" { 1 } else { 4 };
        let killed = program(&strs(&job.args(&job.input, &out, &[])))
            .env("MISTRAL_BATCH_FAULT", format!("{point}:{times}"))
            .stderr(Stdio::null())
            .status()
            .unwrap();
        assert!(!killed.success(), "{point} was not reached");
        let before = job.bucket.list(point);
        assert!(!before.contains_key("_SUCCESS.json"));
        succeed(&strs(&job.args(&job.input, &out, &["--resume"])));
        let after = job.bucket.list(point);
        assert!(before.iter().all(|(name, etag)| after.get(name) == Some(etag)), "{point}: {before:?} {after:?}");
        job.assert_whole(point);
    }
    println!("{kills} random kills");
}

#[test]
#[ignore = "needs an object store"]
fn two_runs_on_one_output_give_one_result() {
    let job = Job::new("two");
    for round in 0..3 {
        let name = format!("shared-{round}");
        let args = job.args(&job.input, &job.bucket.url(&name), &["--resume"]);
        let start = || program(&strs(&args)).stderr(Stdio::piped()).spawn().unwrap();
        let first = start();
        std::thread::sleep(Duration::from_millis(60 * round));
        let runs = [first, start()];
        let codes: Vec<_> = runs.into_iter().map(|run| run.wait_with_output().unwrap().status.code()).collect();
        assert!(codes.contains(&Some(0)), "{codes:?}");
        assert!(codes.iter().all(|code| matches!(code, Some(0 | 75))), "{codes:?}");
        job.assert_whole(&name);
    }
}

#[test]
#[ignore = "needs an object store"]
fn what_is_not_there_or_not_the_same_is_told() {
    let job = Job::new("faults");
    let message = fail(66, &strs(&job.args(&job.bucket.url("none.parquet"), &job.bucket.url("x"), &[])));
    assert!(message.contains("none.parquet") && message.contains("no such object"), "{message}");
    // Killed after its first part, and resumed over an object that was replaced meanwhile.
    let out = job.bucket.url("changed");
    let killed = program(&strs(&job.args(&job.input, &out, &[])))
        .env("MISTRAL_BATCH_FAULT", "after-publish:2")
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(!killed.success());
    let other = job.bucket.scratch.texts("other.parquet", (0..ROWS).map(|_| Some("other words")));
    job.bucket.put("in/in.parquet", other);
    let message = fail(65, &strs(&job.args(&job.input, &out, &["--resume"])));
    assert!(message.contains("in.parquet: changed"), "{message}");
    succeed(&strs(&job.args(&job.input, &out, &["--overwrite"])));
    assert_eq!(read_parquet(job.bucket.download("changed")).num_rows(), ROWS);
    // An object of somebody else is in the way of every flag, and stays.
    job.bucket.put("theirs/notes.txt", &job.local_input);
    for flags in [&[][..], &["--resume"], &["--overwrite"]] {
        let message = fail(73, &strs(&job.args(&job.input, &job.bucket.url("theirs"), flags)));
        assert!(message.contains("notes.txt"), "{message}");
    }
    assert_eq!(job.bucket.list("theirs").len(), 1);
}

#[test]
#[ignore = "needs an object store"]
fn sql_reads_objects() {
    let job = Job::new("sql");
    let query = format!("SELECT count(*) AS rows FROM '{}'", job.input);
    let output = run(&["sql", "-c", &query, "--format", "csv"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(text.lines().last(), Some(ROWS.to_string().as_str()), "{text}");
}

#[test]
#[ignore = "needs an object store"]
fn job_files_take_urls() {
    let job = Job::new("jobs");
    let text = format!(
        "command = \"classify\"\nmodel = \"{}\"\ninput = [\"{}\"]\noutput = \"{}\"\nunit_rows = 200\nreport = \"report.json\"\n",
        checkpoint("cls-window-sharded"),
        job.input,
        job.bucket.url("from-file")
    );
    let file = job.bucket.scratch.write("job.toml", text);
    succeed(&["run", &file, "-q"]);
    job.assert_whole("from-file");
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(job.bucket.scratch.path("report.json")).unwrap()).unwrap();
    assert_eq!(report["hashes"]["output"].as_str().unwrap().len(), 64);
}
