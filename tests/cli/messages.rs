//! What a run says: reports of every end, and logs that programs read.

use std::process::{Command, Stdio};

use serde_json::Value;

use super::support::*;

fn json(scratch: &Scratch, name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(scratch.path(name)).unwrap()).unwrap()
}

#[test]
fn failures_before_a_run_are_reported_too() {
    let scratch = Scratch::new();
    let (model, input) = tickets();
    let report = scratch.arg("report.json");
    let text = format!("command = 'classify'\nmodel = '{model}'\ninput = ['{input}']\noutput = 'out'\n");
    let wrong = scratch.write("wrong.toml", format!("{text}max_lenght = 5\nreport = 'from-${{day}}.json'\n"));
    let broken = scratch.write("broken.toml", "command = = 1");
    let (right, out) = (scratch.write("right.toml", text), scratch.arg("out"));
    let with =
        |args: &[&str]| [args, &["--report", &report]].concat().into_iter().map(str::to_owned).collect::<Vec<_>>();
    for (code, args, says) in [
        (64, with(&["classify", "--frobnicate"]), "--frobnicate"),
        (64, with(&["generate", "-i", &input, "-o", &out, "--model", &model, "--regex", "("]), "regex"),
        (64, with(&["classify", "-i", &input, "-o", &out, "--model", &model, "--text-column", "txt"]), "'text'"),
        (69, with(&["classify", "-i", &input, "-o", &out, "--model", &model, "--device", "cuda:0"]), "cuda:0"),
        (78, with(&["run", &wrong, "--set", "day=1"]), "did you mean 'max_length'?"),
        (78, with(&["check", &wrong, "--set", "day=1"]), "did you mean 'max_length'?"),
        (78, with(&["run", &broken]), "line 1"),
        (64, with(&["run", &right, "--set", "day=1"]), "--set day"),
        (78, with(&["eval", &broken]), "line 1"),
    ] {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let ended = run(&args);
        assert_eq!(ended.status.code(), Some(code), "{args:?}: {}", String::from_utf8_lossy(&ended.stderr));
        let told = json(&scratch, "report.json");
        assert_eq!((&told["status"], &told["exit_code"]), (&"failed".into(), &code.into()), "{args:?}");
        assert_eq!(told["retryable"], false, "{args:?}");
        assert!(told["error"].as_str().unwrap().contains(says), "{args:?}: {told}");
        std::fs::remove_file(scratch.path("report.json")).unwrap();
    }
    // The file's own report, which a check leaves alone.
    fail(78, &["check", &wrong, "--set", "day=1"]);
    assert!(!scratch.path("from-1.json").exists());
    fail(78, &["run", &wrong, "--set", "day=1"]);
    assert_eq!(json(&scratch, "from-1.json")["exit_code"], 78);
}

#[test]
fn a_report_tells_hashes_that_a_person_can_compute_and_a_rerun_reports_too() {
    let scratch = Scratch::new();
    let (model, input) = tickets();
    let text = format!(
        "command = 'classify'\nmodel = '{model}'\ninput = ['{input}']\noutput = 'out'\nunit_rows = 400\n\
         report = 'report.json'\n"
    );
    let job = scratch.write("job.toml", text);
    succeed(&["run", &job]);
    let done = json(&scratch, "report.json");
    let script = format!("sha256sum < {job}; cd {}; sha256sum part-*.parquet | sha256sum", scratch.arg("out"));
    let sums = Command::new("sh").args(["-c", &script]).output().unwrap();
    let sums = String::from_utf8(sums.stdout).unwrap();
    let sums: Vec<&str> = sums.lines().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!((&done["job_file"]["sha256"], &done["hashes"]["output"]), (&sums[0].into(), &sums[1].into()));
    for key in ["job", "inputs", "config", "weights", "tokenizer"] {
        assert_eq!(done["hashes"][key].as_str().unwrap().len(), 64, "{key}");
    }
    let timings = &done["details"]["timings"];
    let seconds = |key: &str| timings[key].as_f64().unwrap();
    assert!(seconds("model_seconds") > 0.0 && seconds("pipeline_seconds") <= seconds("total_seconds"), "{timings}");

    succeed(&["run", &job]);
    let again = json(&scratch, "report.json");
    assert_eq!((&again["status"], &again["exit_code"]), (&"nothing_to_do".into(), &0.into()));
    assert_eq!((&again["hashes"], &again["retryable"]), (&done["hashes"], &false.into()));
    assert_eq!(again["finished_earlier"]["rows_out"], done["details"]["rows_out"]);
}

#[test]
fn a_terminated_job_says_that_it_can_be_run_again_and_can() {
    let scratch = Scratch::new();
    let input = scratch.texts("in.parquet", (0..20_000).map(|_| Some("some words of a text")));
    let text = format!(
        "command = 'classify'\nmodel = '{}'\ninput = ['{input}']\noutput = 'out'\nunit_rows = 100\nprogress = 'none'\n\
         report = 'report.json'\nlog_format = 'json'\n",
        checkpoint("cls-window-sharded")
    );
    let job = scratch.write("job.toml", text);
    let child = program(&["run", &job]).stderr(Stdio::piped()).spawn().unwrap();
    while !scratch.path("out/part-000001.parquet").exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // A second run meanwhile: the lock.
    let second = run(&["run", &job, "--report", &scratch.arg("second.json")]);
    assert_eq!(second.status.code(), Some(75));
    assert_eq!(json(&scratch, "second.json")["retryable"], true);
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let stopped = child.wait_with_output().unwrap();
    assert_eq!(stopped.status.code(), Some(143));
    let last = String::from_utf8(stopped.stderr).unwrap();
    let last: Value = serde_json::from_str(last.lines().last().unwrap()).unwrap();
    assert_eq!((&last["level"], &last["exit_code"], &last["retryable"]), (&"ERROR".into(), &143.into(), &true.into()));
    let told = json(&scratch, "report.json");
    assert_eq!(
        (&told["status"], &told["exit_code"], &told["retryable"]),
        (&"stopped".into(), &143.into(), &true.into())
    );
    assert!(told["progress"]["units_committed"].as_u64().unwrap() >= 2, "{told}");
    succeed(&["run", &job]);
    let done = json(&scratch, "report.json");
    assert_eq!((&done["status"], &done["details"]["rows_out"]), (&"done".into(), &20_000.into()));
    assert!(done["details"]["units_resumed"].as_u64().unwrap() >= 2);
}

#[test]
fn logs_are_lines_or_json_and_as_loud_as_asked() {
    let scratch = Scratch::new();
    let (model, input) = tickets();
    let classify = |name: &str, extra: &[&str]| {
        let output = scratch.arg(name);
        let args = ["classify", "-i", &input, "-o", &output, "--model", &model, "-L", "20", "--log-format", "json"];
        run(&[&args[..], extra].concat())
    };
    let lines = |output: std::process::Output| -> Vec<Value> {
        assert!(output.stdout.is_empty());
        let stderr = String::from_utf8(output.stderr).unwrap();
        let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        stderr.lines().map(parse).collect()
    };
    let levels =
        |lines: &[Value]| lines.iter().map(|line| line["level"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    let usual = lines(classify("usual", &[]));
    assert!(levels(&usual).iter().all(|level| level == "INFO"), "{usual:?}");
    let last = usual.last().unwrap();
    assert_eq!((&last["status"], &last["rows_out"]), (&"done".into(), &20.into()));
    assert!(last["message"].as_str().unwrap().starts_with("written to ") && last["timestamp"].is_string(), "{last}");
    assert!(levels(&lines(classify("verbose", &["-v"]))).contains(&"DEBUG".to_owned()));
    assert!(lines(classify("quiet", &["-q"])).is_empty());
    for (code, extra) in [(64, &["--text-column", "txt"][..]), (64, &["--frobnicate"]), (64, &["--progress", "bar"])] {
        let failed = classify("failed", extra);
        assert_eq!(failed.status.code(), Some(code));
        let failed = lines(failed);
        assert_eq!(levels(&failed), ["ERROR"], "{extra:?}");
        assert_eq!((&failed[0]["exit_code"], &failed[0]["retryable"]), (&code.into(), &false.into()));
    }
}
