//! Job files: those that come with the project, and how they behave in a scheduler's hands.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::support::*;

#[test]
fn every_job_file_that_comes_along_runs_and_a_rerun_has_nothing_to_do() {
    let scratch = Scratch::new();
    let set = format!("out={}", scratch.path("").display());
    let mut names: Vec<_> = std::fs::read_dir(project("jobs")).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    assert_eq!(names.len(), 5, "a job file for every command");
    for path in names {
        let path = path.to_str().unwrap();
        let checked = run(&["check", path, "--set", &set]);
        let text = String::from_utf8(checked.stdout).unwrap();
        assert!(checked.status.success(), "{path}: {}", String::from_utf8_lossy(&checked.stderr));
        assert!(text.contains("tokens a row: median") && text.contains("nothing was written"), "{text}");
        let report = scratch.arg("report.json");
        let ran = succeed(&["run", path, "--set", &set, "--audit", "20", "--report", &report]);
        assert!(ran.contains("audit: 20 rows computed once more, alone: ") && ran.contains("written to"), "{ran}");
        let report: Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
        let audit = &report["details"]["audit"];
        assert_eq!((&audit["rows"], &audit["rows_flipped"]), (&20.into(), &0.into()), "{path}: {audit}");
        match audit["largest_difference"].as_f64() {
            Some(difference) => assert!(difference < 1e-3, "{path}: {audit}"),
            None => assert_eq!(audit["compared"], "completions"),
        }
        assert!(succeed(&["run", path, "--set", &set]).contains("nothing to do"), "{path}");
    }
    let labelled = read_parquet(scratch.path("classify-2026-01-01"));
    assert!(labelled.column_by_name("predicted_label").is_some());
}

#[test]
fn a_check_writes_nothing_but_its_report() {
    let scratch = Scratch::new();
    let (model, input) = tickets();
    let (output, report) = (scratch.arg("out"), scratch.arg("report.json"));
    let args = ["classify", "-i", &input, "--model", &model, "-o", &output, "--dry-run", "--report", &report];
    let first = run(&args);
    assert!(first.status.success());
    assert!(!scratch.path("out").exists());
    let facts = || serde_json::from_slice::<Value>(&std::fs::read(scratch.path("report.json")).unwrap()).unwrap();
    let checked = facts();
    let sample = &checked["sample"];
    let rows: u64 = sample["histogram"].as_array().unwrap().iter().map(|b| b["rows"].as_u64().unwrap()).sum();
    assert_eq!(rows, sample["rows"].as_u64().unwrap());
    assert_eq!(checked["rows"], sample["rows_read"], "the sample is the whole of a small input");
    assert!(sample["plain_padding_percent"].as_f64().unwrap() > sample["padding_percent"].as_f64().unwrap());

    // What the check foretells is what the run does.
    let args = ["classify", "-i", &input, "--model", &model, "-o", &output, "--report", &report];
    succeed(&args);
    let details = facts()["details"].clone();
    for (told, done) in [("tokens", "tokens"), ("batches", "batches"), ("rows_truncated", "rows_truncated")] {
        assert_eq!(sample[told], details[done], "{told}");
    }
    assert_eq!(checked["fingerprint"], details["fingerprint"]);
    assert_eq!(checked["time"]["tokens"], details["tokens"]);
}

#[test]
fn a_check_refuses_what_the_run_would() {
    let scratch = Scratch::new();
    let (model, input) = tickets();
    let text = |extra: &str| {
        format!("command = 'classify'\nmodel = '{model}'\ninput = ['{input}']\noutput = 'out'\n{extra}\n")
    };
    let job = scratch.write("job.toml", text("text_column = 'nowhere'"));
    assert!(fail(64, &["check", &job]).contains("nowhere"));
    let job = scratch.write("job.toml", text("max_lenght = 5"));
    for command in ["check", "run"] {
        let message = fail(78, &[command, &job]);
        assert!(message.contains("job.toml: line 5") && message.contains("'max_length'"), "{message}");
    }
    let job = scratch.write("job.toml", text("prefix = '${who}_'"));
    let undefined = program(&["check", &job]).env_remove("who").output().unwrap();
    assert_eq!(undefined.status.code(), Some(78));
    assert!(program(&["check", &job]).env("who", "a").output().unwrap().status.success());
    scratch.write("taken/other.parquet", "not ours");
    fail(73, &["classify", "-i", &input, "--model", &model, "-o", &scratch.arg("taken"), "--dry-run"]);
}

#[test]
fn a_job_file_resumes_its_own_output_from_anywhere() {
    let scratch = Scratch::new();
    let (model, input) = tickets();
    let text =
        format!("command = 'classify'\nmodel = '{model}'\ninput = ['{input}']\noutput = 'out'\nunit_rows = 50\n");
    let job = scratch.write("job.toml", text);
    succeed(&["run", &job]);
    let whole = read_parquet(scratch.path("out"));
    // As after a kill: a part is missing, and so is the mark of success.
    std::fs::remove_file(scratch.path("out/part-000001.parquet")).unwrap();
    std::fs::remove_file(scratch.path("out/_SUCCESS.json")).unwrap();
    let resumed = program(&["run", "job.toml"]).current_dir(scratch.path("")).output().unwrap();
    let stderr = String::from_utf8(resumed.stderr).unwrap();
    assert!(resumed.status.success() && stderr.contains("from an earlier run"), "{stderr}");
    assert_eq!(read_parquet(scratch.path("out")), whole);
}

#[test]
fn the_committed_schemas_are_those_of_this_code() {
    let files = |folder: &Path| -> BTreeMap<PathBuf, String> {
        let pattern = folder.join("**/*.json");
        let paths = glob::glob(pattern.to_str().unwrap()).unwrap().map(Result::unwrap);
        paths
            .map(|path| (path.strip_prefix(folder).unwrap().to_owned(), std::fs::read_to_string(path).unwrap()))
            .collect()
    };
    let scratch = Scratch::new();
    succeed(&["schemas", "--write", &scratch.arg("schemas")]);
    let (written, committed) = (files(&scratch.path("schemas")), files(&project("schemas")));
    assert_eq!(
        written.keys().collect::<Vec<_>>(),
        committed.keys().collect::<Vec<_>>(),
        "run mistral-batch schemas --write schemas"
    );
    for (name, text) in written {
        assert!(committed[&name] == text, "{} is stale: run mistral-batch schemas --write schemas", name.display());
    }
}
