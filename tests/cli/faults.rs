//! A disk that fails: what is visible is whole, what failed says so, and the same command with `--resume` ends as if nothing
//! had been. The failing disk is a library that is preloaded into the program (`failing_disk.c`), and a small file system of
//! its own where this machine lets us mount one.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use arrow::array::RecordBatch;

use super::support::*;

const EINTR: i32 = 4;
const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const EDQUOT: i32 = 122;
/// Not an error: a call that does one byte of its work.
const SHORT: i32 = 0;
const ROWS: usize = 60;
const UNIT_ROWS: usize = 20;

/// The preloaded library, built with the C compiler that the program itself was built with.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = LIBRARY.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("failing_disk.so");
        let source = project("tests/cli/failing_disk.c");
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"])
            .args([&path, &source])
            .arg("-ldl")
            .output()
            .unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        (folder, path)
    });
    path
}

/// One failure: the Nth call of a kind on a path below the output, or on the input.
#[derive(Debug, Clone, Copy)]
struct Failure {
    call: &'static str,
    errno: i32,
    nth: usize,
    /// All later ones fail too, as on a disk that stays full.
    lasting: bool,
}

struct Job {
    scratch: Scratch,
    input: String,
    whole: RecordBatch,
}

impl Job {
    fn new() -> Self {
        let scratch = Scratch::new();
        let texts: Vec<String> =
            (0..ROWS).map(|row| "some words ".repeat(1 + row * 7 % 11) + &row.to_string()).collect();
        let input = scratch.texts("in.parquet", texts.iter().map(|text| Some(text.as_str())));
        let mut job = Self { input, whole: read_parquet(scratch.arg("in.parquet")), scratch };
        job.run("whole", None, &[]);
        job.whole = read_parquet(job.scratch.path("whole"));
        assert_eq!(job.whole.num_rows(), ROWS);
        job
    }

    fn run(&self, output: &str, failure: Option<(Failure, &Path)>, extra: &[&str]) -> Output {
        let model = checkpoint("cls-nopad");
        let unit_rows = UNIT_ROWS.to_string();
        let output = self.scratch.arg(output);
        let args = ["classify", "-i", &self.input, "--model", &model, "--unit-rows", &unit_rows, "-q", "-o", &output];
        let mut command = program(&[&args[..], extra].concat());
        if let Some((failure, below)) = failure {
            command
                .env("LD_PRELOAD", library())
                .env("DISK_CALL", failure.call)
                .env("DISK_BELOW", below)
                .env("DISK_NTH", failure.nth.to_string())
                .env("DISK_ERRNO", failure.errno.to_string())
                .env("DISK_LOG", self.log());
            if failure.lasting {
                command.env("DISK_FULL", "1");
            }
        }
        command.output().unwrap()
    }

    fn log(&self) -> PathBuf {
        self.scratch.path("disk.log")
    }

    /// Runs with the failure, then resumes without: looks at what is visible in between and at the end. Returns the first
    /// run's exit code and message, and whether the failure was met.
    fn survive(&self, name: &str, failure: Failure) -> (Option<i32>, String, bool) {
        let _ = std::fs::remove_file(self.log());
        // What `TempFile` and the plan put beside a single file is below this too.
        let below = self.scratch.path(&format!("{name}/"));
        std::fs::create_dir_all(&below).unwrap();
        let output = format!("{name}/out{}", if name.contains("jsonl") { ".jsonl" } else { "" });
        let failed = self.run(&output, Some((failure, &below)), &[]);
        let log = std::fs::read_to_string(self.log()).unwrap_or_default();
        let met =
            log.lines().any(|line| line.starts_with(failure.call) && line.ends_with(&format!("-{}", failure.errno)));
        no_fsync_is_tried_again(&log);
        let path = self.scratch.path(&output);
        let before = self.whole_or_absent(&path, failed.status.success());
        let message = String::from_utf8(failed.stderr).unwrap();

        let resumed = self.run(&output, None, &["--resume"]);
        assert!(resumed.status.success(), "{name}: {}", String::from_utf8_lossy(&resumed.stderr));
        let after = self.whole_or_absent(&path, true);
        for (part, inode) in before {
            // A single file takes its folder of parts with it.
            assert!(after.is_empty() || after.get(&part) == Some(&inode), "{name}: {part} was computed again");
        }
        (failed.status.code(), message, met)
    }

    /// Every visible file is whole: each part has its unit's rows, the mark of success stands above all of them.
    fn whole_or_absent(&self, output: &Path, finished: bool) -> BTreeMap<String, u64> {
        if output.extension().is_some() {
            // A run may fail after it has published its file, while it tidies up.
            assert!(output.exists() || !finished, "{} is missing", output.display());
            if output.exists() {
                self.same_lines(output);
            }
        }
        let mut parts = BTreeMap::new();
        let Ok(entries) = std::fs::read_dir(output) else { return parts };
        for entry in entries.map(|entry| entry.unwrap()) {
            let name = entry.file_name().into_string().unwrap();
            if let Some(unit) = name.strip_prefix("part-").and_then(|rest| rest.strip_suffix(".parquet")) {
                let first = unit.parse::<usize>().unwrap() * UNIT_ROWS;
                assert!(read_parquet(entry.path()) == self.whole.slice(first, UNIT_ROWS), "{name}");
                parts.insert(name, entry.metadata().unwrap().ino());
            } else if name == "_plan.json" || name == "_SUCCESS.json" {
                let bytes = std::fs::read(entry.path()).unwrap();
                serde_json::from_slice::<serde_json::Value>(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
            } else {
                panic!("{name} was left behind");
            }
        }
        let success = output.join("_SUCCESS.json").exists();
        assert!(!success || parts.len() == ROWS / UNIT_ROWS, "a mark of success above {} parts", parts.len());
        if finished {
            assert!(success && read_parquet(output) == self.whole, "{}", output.display());
        }
        parts
    }

    fn same_lines(&self, output: &Path) {
        let labels = strings(&self.whole, "predicted_label");
        let text = std::fs::read_to_string(output).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), ROWS);
        for (line, label) in lines.iter().zip(labels) {
            assert_eq!(line["predicted_label"].as_str(), label.as_deref());
        }
    }
}

/// The kernel may have dropped what a failed fsync could not write; a second one would say that all is well.
fn no_fsync_is_tried_again(log: &str) {
    let mut failed = BTreeSet::new();
    for line in log.lines().filter_map(|line| line.strip_prefix("synced ")) {
        let (inode, result) = line.split_once(' ').unwrap();
        assert!(!failed.contains(inode), "fsync was tried again: {log}");
        if result != "0" {
            failed.insert(inode);
        }
    }
}

#[test]
fn a_disk_that_fails_once_or_for_good_is_survived() {
    let job = Job::new();
    let mut met = BTreeMap::new();
    let once = |call, errno, nth| Failure { call, errno, nth, lasting: false };
    let mut failures = Vec::new();
    for errno in [ENOSPC, EIO, EDQUOT] {
        // Plan, parts and mark of success, and their directory after each.
        failures.extend([1, 3, 8].map(|nth| once("write", errno, nth)));
        failures.extend([1, 2, 3, 4, 9].map(|nth| once("fsync", errno, nth)));
    }
    failures.extend([1, 2, 4].map(|nth| once("link", EIO, nth)));
    failures.extend([1, 3].map(|nth| once("open", ENOSPC, nth)));
    failures.push(once("mkdir", ENOSPC, 1));
    failures.extend([("write", 2), ("write", 7), ("fsync", 3), ("link", 2)].map(|(call, nth)| Failure {
        call,
        errno: ENOSPC,
        nth,
        lasting: true,
    }));
    for (index, failure) in failures.into_iter().enumerate() {
        let (code, message, was_met) = job.survive(&format!("once-{index}"), failure);
        assert_eq!(was_met, code != Some(0), "{failure:?}: exit {code:?} {message}");
        if was_met {
            assert_eq!(code, Some(74), "{failure:?}: {message}");
            let says = [(ENOSPC, "No space left"), (EIO, "Input/output error"), (EDQUOT, "quota exceeded")];
            let says = says.iter().find(|(errno, _)| *errno == failure.errno).unwrap().1;
            assert!(message.contains(says) && message.contains("once-"), "{failure:?}: {message}");
            assert_eq!(message.contains("--resume"), failure.errno != EIO, "{failure:?}: {message}");
            assert_eq!(message.lines().count(), 1, "{failure:?}: {message}");
        }
        *met.entry((failure.call, failure.errno)).or_insert(0) += usize::from(was_met);
    }
    assert!(met.len() == 10 && met.values().all(|&times| times > 0), "faults that no run met: {met:?}");
}

#[test]
fn a_single_file_appears_whole_or_not_at_all() {
    let job = Job::new();
    let mut met = 0;
    for (index, nth) in (1..=7).enumerate() {
        let failure = Failure { call: "write", errno: ENOSPC, nth, lasting: false };
        met += usize::from(job.survive(&format!("jsonl-write-{index}"), failure).2);
    }
    for (index, (call, nth)) in
        [("fsync", 2), ("fsync", 5), ("link", 2), ("link", 4), ("rename", 1)].into_iter().enumerate()
    {
        let failure = Failure { call, errno: EIO, nth, lasting: false };
        let (code, message, was_met) = job.survive(&format!("jsonl-{index}"), failure);
        assert!(!was_met || code == Some(74), "{failure:?}: {message}");
        met += usize::from(was_met);
    }
    assert!(met >= 8, "only {met} faults were met");
}

#[test]
fn interrupted_and_short_calls_are_no_faults() {
    let job = Job::new();
    for (index, (call, errno, nth)) in
        [("write", SHORT, 1), ("write", SHORT, 6), ("write", EINTR, 2), ("read", EINTR, 3)].into_iter().enumerate()
    {
        let failure = Failure { call, errno, nth, lasting: false };
        let (code, message, _) = job.survive(&format!("short-{index}"), failure);
        assert_eq!(code, Some(0), "{failure:?}: {message}");
    }
}

#[test]
fn an_input_that_cannot_be_read_is_74_and_not_damage() {
    let job = Job::new();
    let text = "some words of a row that is read in pieces ".repeat(20);
    let csv = format!("text\n{}", format!("{text}\n").repeat(200));
    let jsonl = format!("{{\"text\": \"{text}\"}}\n").repeat(200);
    for (name, input) in [
        ("in.parquet", job.input.clone()),
        ("in.csv", job.scratch.write("in.csv", csv)),
        ("in.jsonl", job.scratch.write("in.jsonl", jsonl)),
    ] {
        let mut met = 0;
        for nth in 1..=9 {
            let job = Job { scratch: Scratch::new(), input: input.clone(), whole: job.whole.clone() };
            let failure = Failure { call: "read", errno: EIO, nth, lasting: false };
            let failed = job.run("out", Some((failure, Path::new(&input))), &[]);
            let message = String::from_utf8(failed.stderr).unwrap();
            if failed.status.success() {
                break;
            }
            assert_eq!(failed.status.code(), Some(74), "{name}, read {nth}: {message}");
            assert!(message.contains(name) && message.contains("Input/output error"), "{name}, read {nth}: {message}");
            met += 1;
        }
        // At least in planning, and in decoding.
        assert!(met >= 2, "{name}: {met} reads");
    }
}

#[test]
fn a_small_file_system_that_fills_up_is_survived() {
    let job = Job::new();
    let mount = job.scratch.arg("mount");
    std::fs::create_dir(&mount).unwrap();
    let program = env!("CARGO_BIN_EXE_mistral-batch");
    let model = checkpoint("cls-nopad");
    let classify =
        format!("{program} classify -i {} --model {model} --unit-rows {UNIT_ROWS} -q -o {mount}/out", job.input);
    let saved = job.scratch.arg("saved");
    // The room for the plan and a part, then for all.
    let script = format!(
        "mount -t tmpfs -o size=12k tmpfs {mount} || exit 99
         {classify}; code=$?; cp -r {mount}/out {saved}-full
         mount -o remount,size=64m {mount} && {classify} --resume && cp -r {mount}/out {saved}
         exit $code"
    );
    let ran = Command::new("unshare").args(["--user", "--map-root-user", "--mount", "sh", "-c", &script]).output();
    let Ok(ran) = ran else { return eprintln!("skipped: no unshare(1) on this machine") };
    let message = String::from_utf8_lossy(&ran.stderr);
    if ran.status.code() == Some(99) || message.contains("unshare") {
        return eprintln!("skipped: nothing may be mounted here: {message}");
    }
    assert_eq!(ran.status.code(), Some(74), "{message}");
    assert!(message.contains("No space left") && message.contains("--resume"), "{message}");
    let before = job.whole_or_absent(&job.scratch.path("saved-full"), false);
    assert!(before.len() < ROWS / UNIT_ROWS);
    job.whole_or_absent(&job.scratch.path("saved"), true);
}
