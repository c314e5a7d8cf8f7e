//! Every mistake is told in one line that says what to do, with the exit code of its kind.

use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, StringArray};

use super::support::*;

/// A command line for `input` into a fresh output.
fn classify<'a>(input: &'a str, output: &'a str, model: &'a str) -> Vec<&'a str> {
    vec!["classify", "-i", input, "-o", output, "--model", model]
}

#[test]
fn input_that_is_not_there_is_66() {
    let scratch = Scratch::new();
    let (model, output) = (checkpoint("cls-nopad"), scratch.arg("out"));
    scratch.texts("tickets.parquet", [Some("a")]);
    let message = fail(66, &classify(&scratch.arg("ticket.parquet"), &output, &model));
    assert!(message.contains("ticket.parquet") && message.contains("tickets.parquet"), "{message}");
    std::fs::create_dir(scratch.path("empty")).unwrap();
    let message = fail(66, &classify(&scratch.arg("empty"), &output, &model));
    assert!(message.contains("empty"), "{message}");
    fail(66, &classify(&scratch.arg("*.csv"), &output, &model));
    assert!(!scratch.path("out").exists(), "nothing was created");
}

#[test]
fn a_wrong_column_is_64_and_the_nearest_is_named() {
    let scratch = Scratch::new();
    let (model, output) = (checkpoint("cls-nopad"), scratch.arg("out"));
    let texts: ArrayRef = Arc::new(StringArray::from(vec!["a"]));
    let numbers: ArrayRef = Arc::new(Int64Array::from(vec![1]));
    let input = scratch.parquet("in.parquet", vec![("message", texts), ("count", numbers)]);
    let with = |extra: &[&'static str]| {
        let mut args = vec!["classify", "-i", &input, "-o", &output, "--model", &model];
        args.extend(extra);
        fail(64, &args)
    };
    let message = with(&[]);
    assert!(message.contains("no column 'text'") && message.contains("message, count"), "{message}");
    assert!(with(&["--text-column", "mesage"]).contains("did you mean 'message'?"));
    assert!(with(&["--text-column", "count"]).contains("type Int64, but text is needed"));
    assert!(with(&["--text-column", "message", "--keep", "coumt"]).contains("did you mean 'count'?"));
    assert!(with(&["--text-column", "message", "--truth-column", "label"]).contains("--truth-column"));
    assert!(with(&["--text-column", "message", "--where", "cuont > 1"]).contains("count"));
    assert!(with(&["--text-column", "message", "--where", "count + 1"]).contains("not a condition"));
    assert!(!scratch.path("out").exists());
}

#[test]
fn a_result_column_that_is_there_already_is_64_and_a_prefix_helps() {
    let scratch = Scratch::new();
    let model = checkpoint("cls-nopad");
    let column = || Arc::new(StringArray::from(vec!["a"])) as ArrayRef;
    let input = scratch.parquet("in.parquet", vec![("text", column()), ("predicted_label", column())]);
    let message = fail(64, &classify(&input, &scratch.arg("out"), &model));
    assert!(message.contains("'predicted_label'") && message.contains("--prefix"), "{message}");
    let output = scratch.arg("prefixed");
    succeed(&["classify", "-i", &input, "-o", &output, "--model", &model, "--prefix", "m_"]);
    let names = column_names(&read_parquet(&output));
    assert_eq!(
        names,
        ["text", "predicted_label", "m_predicted_label", "m_predicted_score", "m_num_tokens", "m_truncated", "m_error"]
    );
}

#[test]
fn damaged_and_drifting_input_is_65() {
    let scratch = Scratch::new();
    let (model, output) = (checkpoint("cls-nopad"), scratch.arg("out"));
    let input = scratch.texts("whole.parquet", [Some("a"), Some("b")]);
    let bytes = std::fs::read(&input).unwrap();
    let truncated = scratch.write("truncated.parquet", &bytes[..bytes.len() / 2]);
    assert!(fail(65, &classify(&truncated, &output, &model)).contains("truncated.parquet"));
    let foreign = scratch.write("foreign.parquet", "these are no columns");
    assert!(fail(65, &classify(&foreign, &output, &model)).contains("foreign.parquet"));

    scratch.texts("mixed/a.parquet", [Some("a")]);
    scratch.parquet("mixed/b.parquet", vec![("text", Arc::new(Int64Array::from(vec![1])))]);
    let message = fail(65, &classify(&scratch.arg("mixed"), &output, &model));
    assert!(message.contains("a.parquet") && message.contains("b.parquet") && message.contains("Int64"), "{message}");
    assert!(!scratch.path("out").exists());
}

#[test]
fn an_unusable_checkpoint_is_78() {
    let scratch = Scratch::new();
    let input = scratch.texts("in.parquet", [Some("a")]);
    let output = scratch.arg("out");
    let refuse = |model: &std::path::Path| fail(78, &classify(&input, &output, model.to_str().unwrap()));

    assert!(refuse(&scratch.path("nowhere")).contains("no such folder"));
    let copy = scratch.checkpoint("cls-nopad");
    std::fs::remove_file(copy.join("tokenizer.json")).unwrap();
    assert!(refuse(&copy).contains("tokenizer.json"));

    let copy = scratch.checkpoint("cls-window-sharded");
    let shard = copy.join("model-00002-of-00003.safetensors");
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() - 4]).unwrap();
    assert!(refuse(&copy).contains("model-00002-of-00003.safetensors"));
    std::fs::remove_file(&shard).unwrap();
    assert!(refuse(&copy).contains("model-00002-of-00003.safetensors"));

    let copy = scratch.checkpoint("cls-multilabel-bf16");
    let file = copy.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let end = bytes.len();
    bytes[end - 2..].copy_from_slice(&[0xc0, 0x7f]); // a NaN in bfloat16
    std::fs::write(&file, &bytes).unwrap();
    assert!(refuse(&copy).contains("NaN"));

    let edit = |from: &str, to: &str| {
        let copy = scratch.checkpoint("cls-nopad");
        let config = copy.join("config.json");
        let text = std::fs::read_to_string(&config).unwrap();
        assert!(text.contains(from));
        std::fs::write(&config, text.replace(from, to)).unwrap();
        refuse(&copy)
    };
    assert!(edit("\"model_type\": \"mistral\"", "\"model_type\": \"llama\"").contains("not a Mistral checkpoint"));
    assert!(edit("\"intermediate_size\": 128", "\"intermediate_size\": 96").contains("shape"));
    assert!(edit("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3").contains("no tensor 'model.layers.2."));
    let other_head = checkpoint("lm-window");
    assert!(refuse(other_head.as_ref()).contains("MistralForCausalLM"));
}

#[test]
fn a_hub_id_is_found_in_the_cache_or_the_way_to_get_it_is_told() {
    let scratch = Scratch::new();
    let input = scratch.texts("in.parquet", [Some("a")]);
    let output = scratch.arg("out");
    let mut command = program(&classify(&input, &output, "acme/classifier"));
    let result = command.env("HF_HOME", scratch.path("hf")).output().unwrap();
    assert_eq!(result.status.code(), Some(78));
    assert!(String::from_utf8_lossy(&result.stderr).contains("hf download acme/classifier"));

    let repository = scratch.path("hf/hub/models--acme--classifier");
    std::fs::create_dir_all(repository.join("refs")).unwrap();
    std::fs::create_dir_all(repository.join("snapshots")).unwrap();
    std::fs::write(repository.join("refs/main"), "abc123").unwrap();
    std::os::unix::fs::symlink(checkpoint("cls-nopad"), repository.join("snapshots/abc123")).unwrap();
    let result =
        program(&classify(&input, &output, "acme/classifier")).env("HF_HOME", scratch.path("hf")).output().unwrap();
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
}

#[test]
fn an_output_that_is_in_the_way_is_73() {
    let scratch = Scratch::new();
    let model = checkpoint("cls-nopad");
    let input = scratch.texts("in.parquet", [Some("a")]);
    scratch.write("out/notes.txt", "mine");
    let output = scratch.arg("out");
    assert!(fail(73, &classify(&input, &output, &model)).contains("notes.txt"));
    let mut overwrite = classify(&input, &output, &model);
    overwrite.push("--overwrite");
    fail(73, &overwrite);
    assert_eq!(std::fs::read_to_string(scratch.path("out/notes.txt")).unwrap(), "mine");
    let under_a_file = format!("{input}/out");
    fail(73, &classify(&input, &under_a_file, &model));
}

#[test]
fn a_full_disk_is_74_and_leaves_nothing_that_looks_whole() {
    // A file-size limit stands in for a full disk: both fail a write half way.
    let scratch = Scratch::new();
    let model = checkpoint("cls-nopad");
    let texts: Vec<String> = (0..3000u64).map(|i| format!("{:x}", (i + 1).wrapping_mul(0x9e3779b97f4a7c15))).collect();
    let input = scratch.texts("in.parquet", texts.iter().map(|text| Some(text.as_str())));
    let output = scratch.arg("out");
    let script = format!(
        "trap '' XFSZ; ulimit -f 16; exec {} classify -i {input} -o {output} --model {model} --unit-rows 1024 -q",
        env!("CARGO_BIN_EXE_mistral-batch")
    );
    let result = std::process::Command::new("bash").args(["-c", &script]).output().unwrap();
    let stderr = String::from_utf8_lossy(&result.stderr);
    assert_eq!(result.status.code(), Some(74), "{stderr}");
    assert!(stderr.contains("part-00000"), "{stderr}");
    let left: Vec<_> = std::fs::read_dir(&output).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["_plan.json"], "no part, no temporary file, no mark of success");
    succeed(&["classify", "-i", &input, "-o", &output, "--model", &model, "--unit-rows", "1024", "--resume"]);
    assert_eq!(read_parquet(&output).num_rows(), 3000);
}

#[test]
fn row_errors_are_recorded_or_stop_the_run_as_asked() {
    let scratch = Scratch::new();
    let model = checkpoint("cls-nopad");
    let input = scratch
        .texts("in.parquet", [Some("short"), Some("a text that is much too long for the limit"), None, Some("ok")]);
    let output = scratch.arg("recorded");
    let flags = ["--max-length", "8", "--overflow", "error"];
    let with = |output: &str, extra: &[&str]| {
        let mut args: Vec<String> = classify(&input, output, &model).into_iter().map(str::to_owned).collect();
        args.extend(flags.iter().chain(extra).map(|s| s.to_string()));
        args
    };
    fn refs(args: &[String]) -> Vec<&str> {
        args.iter().map(String::as_str).collect()
    }
    let summary = succeed(&refs(&with(&output, &[])));
    assert!(summary.contains("4 rows in, 4 rows out: 1 failed, 0 truncated, 1 null"), "{summary}");
    let results = read_parquet(&output);
    let errors = strings(&results, "error");
    assert!(errors[1].as_ref().unwrap().contains("over the limit of 8"));
    assert!([0, 2, 3].iter().all(|&row| errors[row].is_none()));
    let labels = strings(&results, "predicted_label");
    assert!(labels[0].is_some() && labels[1].is_none() && labels[2].is_none() && labels[3].is_some());
    assert_eq!(counts(&results, "num_tokens")[2], None, "a null text has no tokens");

    let message = fail(65, &refs(&with(&scratch.arg("failed"), &["--on-error", "fail"])));
    assert!(message.contains("row 1 of") && message.contains("over the limit"), "{message}");
    fail(65, &refs(&with(&scratch.arg("none-allowed"), &["--max-errors", "0"])));
    succeed(&refs(&with(&scratch.arg("one-allowed"), &["--max-errors", "1"])));
}

#[test]
fn usage_is_64_and_help_is_0() {
    for args in [
        &["classify"][..],
        &["classify", "--nonsense"],
        &["classify", "-i", "x", "-o", "y", "--model", "z", "--max-length", "0"],
        &[],
    ] {
        assert_eq!(run(args).status.code(), Some(64), "{args:?}");
    }
    let help = run(&["classify", "--help"]);
    assert_eq!(help.status.code(), Some(0));
    let help = String::from_utf8(help.stdout).unwrap();
    for flag in ["--input", "--where", "--truth-column", "--overflow", "--max-batch-tokens", "--report"] {
        assert!(help.contains(flag), "{flag}");
    }
    assert_eq!(run(&["--version"]).status.code(), Some(0));
    let scratch = Scratch::new();
    let input = scratch.texts("in.parquet", [Some("a")]);
    let (output, model) = (scratch.arg("out"), checkpoint("cls-nopad"));
    let with = |code, extra: &[&'static str]| {
        let mut args = vec!["classify", "-i", &input, "-o", &output, "--model", &model];
        args.extend(extra);
        fail(code, &args)
    };
    assert!(with(69, &["--device", "cuda:0"]).contains("CPU only"));
    assert!(with(64, &["--max-length", "1000000"]).contains("positions"));
    assert!(with(64, &["--max-length", "1"]).contains("no room"));
    assert!(with(64, &["-i", "s3://bucket/x.parquet"]).contains("s3://"));
    let regression = checkpoint("cls-regression-f16");
    let message = fail(64, &["classify", "-i", &input, "-o", &output, "--model", &regression, "--top-k", "2"]);
    assert!(message.contains("--top-k"), "{message}");
}
