//! A job that is killed, whenever and however often, ends as if it had not been.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use arrow::array::RecordBatch;

use super::support::*;

const FAULT_POINTS: [&str; 6] =
    ["before-write", "after-write", "before-fsync", "before-publish", "after-publish", "before-success"];
const ROWS: usize = 3000;

/// One dataset, its uninterrupted result, and the command line that makes it.
struct Job {
    scratch: Scratch,
    args: Vec<String>,
    whole: RecordBatch,
}

impl Job {
    fn new() -> Self {
        let scratch = Scratch::new();
        let texts: Vec<String> = (0..ROWS).map(|i| "some words ".repeat(1 + i * 13 % 17) + &i.to_string()).collect();
        let input = scratch.texts("in.parquet", texts.iter().map(|text| Some(text.as_str())));
        let model = checkpoint("cls-window-sharded");
        let args = ["classify", "-i", &input, "--model", &model, "--unit-rows", "200", "-q", "-o"].map(str::to_owned);
        let whole = scratch.arg("whole");
        let mut job = Self {
            scratch,
            args: args.to_vec(),
            whole: RecordBatch::new_empty(arrow::datatypes::Schema::empty().into()),
        };
        succeed(&job.command(&whole, &[]).iter().map(String::as_str).collect::<Vec<_>>());
        job.whole = read_parquet(&whole);
        assert_eq!(job.whole.num_rows(), ROWS);
        job
    }

    fn command(&self, output: &str, extra: &[&str]) -> Vec<String> {
        self.args
            .iter()
            .cloned()
            .chain([output.to_owned()])
            .chain(extra.iter().map(|flag| (*flag).to_owned()))
            .collect()
    }

    /// What was published so far: each part's inode.
    fn parts(&self, output: &Path) -> BTreeMap<String, u64> {
        let Ok(entries) = std::fs::read_dir(output) else { return BTreeMap::new() };
        let named = entries.map(|entry| entry.unwrap()).map(|entry| {
            (entry.file_name().into_string().unwrap(), entry.metadata().map(|metadata| metadata.ino()).unwrap_or(0))
        });
        named.filter(|(name, _)| name.starts_with("part-")).collect()
    }

    /// Every published part is whole and stays the file it was; the end is the uninterrupted result.
    fn finish(&self, name: &str, before: &BTreeMap<String, u64>) {
        let output = self.scratch.arg(name);
        let args = self.command(&output, &["--resume"]);
        succeed(&args.iter().map(String::as_str).collect::<Vec<_>>());
        let after = self.parts(&self.scratch.path(name));
        for (part, inode) in before {
            assert_eq!(after.get(part), Some(inode), "{name}: {part} was computed again");
        }
        assert!(read_parquet(&output) == self.whole, "{name}: other rows than those of an uninterrupted run");
        let left: Vec<_> = std::fs::read_dir(&output)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|file| file.contains(".tmp-"))
            .collect();
        assert!(left.is_empty(), "{name}: {left:?}");
    }
}

#[test]
fn every_fault_point_is_survived() {
    let job = Job::new();
    for point in FAULT_POINTS {
        for time in [1, 2, 3, 9] {
            let name = format!("{point}-{time}");
            let output = job.scratch.arg(&name);
            let args = job.command(&output, &[]);
            let killed = program(&args.iter().map(String::as_str).collect::<Vec<_>>())
                .env("MISTRAL_BATCH_FAULT", format!("{point}:{time}"))
                .stderr(Stdio::null())
                .status()
                .unwrap();
            if point == "before-success" && time > 1 {
                assert!(killed.success(), "{name} is reached once only");
                continue;
            }
            assert!(!killed.success(), "{name} was not reached");
            assert!(!job.scratch.path(&name).join("_SUCCESS.json").exists(), "{name}");
            let before = job.parts(&job.scratch.path(&name));
            for part in before.keys() {
                read_parquet(job.scratch.path(&name).join(part));
            }
            job.finish(&name, &before);
        }
    }
}

/// Kills runs of one job at random moments until it ends by itself; returns how many kills met it at work.
fn kill_until_done(job: &Job, name: &str, seed: u64, whole_run: Duration) -> usize {
    let output = job.scratch.arg(name);
    let mut state = seed;
    let mut kills = 0;
    let mut before = BTreeMap::new();
    loop {
        let args = job.command(&output, &["--resume"]);
        let mut child =
            program(&args.iter().map(String::as_str).collect::<Vec<_>>()).stderr(Stdio::null()).spawn().unwrap();
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        std::thread::sleep(whole_run.mul_f64((state >> 40) as f64 / (1u64 << 24) as f64 * 0.6));
        child.kill().unwrap();
        let status = child.wait().unwrap();
        let now = job.parts(Path::new(&output));
        for (part, inode) in &before {
            assert_eq!(now.get(part), Some(inode), "{part} was computed again");
        }
        before = now;
        if status.success() {
            break;
        }
        kills += 1;
        assert!(kills < 1000, "no progress");
    }
    job.finish(name, &before);
    kills
}

fn random_kills(wanted: usize) {
    let job = Job::new();
    let started = Instant::now();
    succeed(&job.command(&job.scratch.arg("timed"), &[]).iter().map(String::as_str).collect::<Vec<_>>());
    let whole_run = started.elapsed();
    let mut kills = 0;
    let mut round = 0;
    while kills < wanted {
        round += 1;
        kills += kill_until_done(&job, &format!("killed-{round}"), round, whole_run);
    }
}

#[test]
fn fifty_random_kills_lose_and_double_nothing() {
    random_kills(50);
}

#[test]
#[ignore = "takes minutes"]
fn five_hundred_random_kills_lose_and_double_nothing() {
    random_kills(500);
}

#[test]
fn two_runs_on_one_output_give_one_result() {
    let job = Job::new();
    let output = job.scratch.arg("shared");
    let args = job.command(&output, &[]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let runs: Vec<_> = (0..2).map(|_| program(&args).stderr(Stdio::piped()).spawn().unwrap()).collect();
    let codes: Vec<_> = runs.into_iter().map(|run| run.wait_with_output().unwrap().status.code()).collect();
    // The slower one finds the output held (75), unfinished (73), or done (0), as its moment has it.
    assert!(codes.contains(&Some(0)), "{codes:?}");
    assert!(codes.iter().all(|code| matches!(code, Some(0 | 73 | 75))), "{codes:?}");
    assert!(read_parquet(&output) == job.whole);
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

/// Starts the job and waits until it is at work: its second part is there.
fn at_work(job: &Job, name: &str) -> Child {
    let args = job.command(&job.scratch.arg(name), &[]);
    let child = program(&args.iter().map(String::as_str).collect::<Vec<_>>()).stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while !job.scratch.path(name).join("part-000001.parquet").exists() {
        assert!(started.elapsed() < Duration::from_secs(60), "the job does not get to work");
        std::thread::sleep(Duration::from_millis(1));
    }
    child
}

#[test]
fn signals_leave_whole_parts_and_nothing_else() {
    let job = Job::new();
    for (name, number, code) in [("-INT", "SIGINT", 130), ("-TERM", "SIGTERM", 143)] {
        let child = at_work(&job, number);
        signal(&child, name);
        let ended = child.wait_with_output().unwrap();
        let message = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.code(), Some(code), "{message}");
        assert!(message.contains(&format!("stopped by {number}")) && message.contains("--resume"), "{message}");
        let output = job.scratch.path(number);
        let files: Vec<String> = std::fs::read_dir(&output)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|file| file != "_plan.json")
            .collect();
        assert!(files.iter().all(|file| file.starts_with("part-")), "{files:?}");
        let before = job.parts(&output);
        for part in before.keys() {
            read_parquet(output.join(part));
        }
        job.finish(number, &before);
    }
}

#[test]
fn a_second_interrupt_stops_at_once() {
    // One batch of all rows, which takes seconds: the first signal waits for its end, the second does not.
    let scratch = Scratch::new();
    let text = "some words of a long text ".repeat(120);
    let input = scratch.texts("in.parquet", (0..4000).map(|_| Some(text.as_str())));
    let (model, output) = (checkpoint("cls-window-sharded"), scratch.arg("out"));
    let args = ["classify", "-i", &input, "-o", &output, "--model", &model, "--max-batch-tokens", "100M", "-q"];
    let mut child = program(&args).stderr(Stdio::piped()).spawn().unwrap();
    while !scratch.path("out/_plan.json").exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(400));
    signal(&child, "-INT");
    std::thread::sleep(Duration::from_millis(200));
    assert!(child.try_wait().unwrap().is_none(), "the batch was too short for this test");
    let second = Instant::now();
    signal(&child, "-INT");
    let status = child.wait().unwrap();
    assert!(second.elapsed() < Duration::from_secs(1), "it took {:?}", second.elapsed());
    assert_eq!(status.code(), Some(130));
    assert!(!scratch.path("out/_SUCCESS.json").exists() && !scratch.path("out/part-000000.parquet").exists());
}
