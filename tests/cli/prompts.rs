//! Prompts from templates over columns, and from chats.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Int64Array, RecordBatch, StringArray};

use super::support::*;

/// Classifies a file with extra flags.
fn classify(scratch: &Scratch, input: &str, name: &str, model: &str, extra: &[&str]) -> RecordBatch {
    let output = scratch.arg(name);
    let mut args = vec!["classify", "-i", input, "-o", &output, "--model", model, "--keep", "n"];
    args.extend(extra);
    succeed(&args);
    read_parquet(&output)
}

fn texts(texts: &[Option<&str>]) -> ArrayRef {
    Arc::new(texts.iter().copied().collect::<StringArray>())
}

#[track_caller]
fn assert_same(ours: &RecordBatch, theirs: &RecordBatch) {
    assert_eq!(ours.schema().fields(), theirs.schema().fields());
    for (place, field) in ours.schema().fields().iter().enumerate() {
        assert!(
            ours.column(place) == theirs.column(place),
            "{}:\n{:?}\n{:?}",
            field.name(),
            ours.column(place).slice(0, ours.num_rows().min(8)),
            theirs.column(place).slice(0, ours.num_rows().min(8))
        );
    }
}

fn numbers(rows: usize) -> ArrayRef {
    Arc::new(Int64Array::from_iter_values(0..rows as i64))
}

#[test]
fn a_prompt_template_equals_a_column_of_its_renderings() {
    let scratch = Scratch::new();
    let model = checkpoint("cls-window-sharded");
    let input = scratch.parquet(
        "in.parquet",
        vec![
            ("n", numbers(4)),
            ("subject", texts(&[Some("Refund"), Some("{n} naïve </s>"), None, Some("")])),
            ("text", texts(&[Some("where is it?\n"), Some("😀"), Some("x"), Some("y")])),
            (
                "rendered",
                texts(&[Some("0 {Refund}: where is it?\n"), Some("1 {{n} naïve </s>}: 😀"), None, Some("3 {}: y")]),
            ),
        ],
    );
    let template = "{n} {{{subject}}}: {text}";
    let ours = classify(&scratch, &input, "template", &model, &["--prompt-template", template]);
    let column = classify(&scratch, &input, "column", &model, &["--text-column", "rendered"]);
    assert_same(&ours, &column);
    assert_eq!(strings(&ours, "predicted_label").iter().filter(|label| label.is_none()).count(), 1);
    // No column needs the name of the default.
    let input = scratch.parquet("other.parquet", vec![("n", numbers(2))]);
    let results = classify(&scratch, &input, "other", &model, &["--prompt-template", "{n}"]);
    assert!(strings(&results, "predicted_label").iter().all(Option::is_some));
}

#[test]
fn chats_equal_texts_of_the_same_tokens() {
    let scratch = Scratch::new();
    let (model, _) = tickets();
    let sorting = project("sample-data/sorting.parquet").to_str().unwrap().to_owned();
    let chats = read_parquet(&sorting);
    let rows = chats.num_rows();
    let rendered: Vec<String> =
        strings(&chats, "prompt").iter().map(|prompt| format!("[INST] {}[/INST]", prompt.as_ref().unwrap())).collect();
    let as_json = |prompt: &Option<String>| {
        serde_json::json!([{ "content": prompt.as_ref().unwrap(), "role": "user" }]).to_string()
    };
    let json: Vec<String> = strings(&chats, "prompt").iter().map(as_json).collect();
    let input = scratch.parquet(
        "in.parquet",
        vec![
            ("n", numbers(rows)),
            ("chat", chats.column_by_name("messages").unwrap().clone()),
            ("json", Arc::new(StringArray::from(json))),
            ("text", Arc::new(StringArray::from(rendered))),
        ],
    );
    // The template writes BOS itself; for the text the tokenizer adds it.
    let text = classify(&scratch, &input, "text", &model, &[]);
    assert_same(&classify(&scratch, &input, "chat", &model, &["--chat-column", "chat"]), &text);
    assert_same(&classify(&scratch, &input, "json", &model, &["--chat-column", "json"]), &text);
    let with_system = classify(&scratch, &input, "system", &model, &["--chat-column", "json", "--system", "Sort."]);
    assert!(counts(&with_system, "num_tokens").iter().zip(counts(&text, "num_tokens")).all(|(a, b)| *a > b));
}

#[test]
fn a_bad_chat_fails_its_row_and_a_null_chat_is_null() {
    let scratch = Scratch::new();
    let model = checkpoint("cls-window-sharded");
    let chat = texts(&[
        Some(r#"[{"role": "user", "content": "Hi there"}]"#),
        Some(r#"[{"role": "assistant", "content": "Hi there"}]"#),
        None,
        Some("Hi there"),
        Some(r#"[{"content": "Hi there"}]"#),
        Some(r#"[{"role": "user", "content": "Hi there"}]"#),
    ]);
    let input = scratch.parquet("in.parquet", vec![("n", numbers(6)), ("chat", chat)]);
    let results = classify(&scratch, &input, "out", &model, &["--chat-column", "chat"]);
    let errors = strings(&results, "error");
    let starts = [
        None,
        Some("the chat template failed: expected a user turn, got assistant"),
        None,
        Some("the chat is not JSON"),
        Some("message 1 of the chat has no role"),
        None,
    ];
    for (row, start) in starts.into_iter().enumerate() {
        assert_eq!(errors[row].is_some(), start.is_some(), "{errors:?}");
        assert!(errors[row].as_deref().unwrap_or_default().starts_with(start.unwrap_or_default()), "{errors:?}");
    }
    let labels = results.column_by_name("predicted_label").unwrap().as_string::<i32>();
    assert_eq!((0..6).map(|row| labels.is_valid(row)).collect::<Vec<_>>(), [true, false, false, false, false, true]);
    assert_eq!(counts(&results, "num_tokens"), [Some(19), None, None, None, None, Some(19)]);
    let output = scratch.arg("strict");
    let args = ["classify", "-i", &input, "-o", &output, "--model", &model, "--chat-column", "chat"];
    let message = fail(65, &[&args[..], &["--on-error", "fail"]].concat());
    assert!(message.contains("row 1 of") && message.contains("got assistant"), "{message}");
}

#[test]
fn mistakes_are_told_before_anything_is_computed() {
    let scratch = Scratch::new();
    let model = checkpoint("cls-window-sharded");
    let chats = read_parquet(project("sample-data/sorting.parquet")).column_by_name("messages").unwrap().slice(0, 2);
    let input = scratch.parquet(
        "in.parquet",
        vec![("count", numbers(2)), ("message", texts(&[Some("a"), Some("b")])), ("chat", chats)],
    );
    let output = scratch.arg("out");
    let with = |code: i32, model: &str, extra: &[&str]| {
        let args = ["classify", "-i", &input, "-o", &output, "--model", model];
        let message = fail(code, &[&args[..], extra].concat());
        assert!(!scratch.path("out").exists());
        message
    };
    let message = with(64, &model, &["--prompt-template", "{mesage}"]);
    assert!(message.contains("did you mean 'message'?") && message.contains("--prompt-template"), "{message}");
    assert!(with(64, &model, &["--prompt-template", "{message"]).contains("'{' at byte 0 is not closed"));
    let message = with(64, &model, &["--prompt-template", "{message} {chat}"]);
    assert!(message.contains("column 'chat' has type List"), "{message}");
    assert!(with(64, &model, &["--chat-column", "chta"]).contains("did you mean 'chat'?"));
    let message = with(64, &model, &["--chat-column", "count"]);
    assert!(message.contains("type Int64, but a list of structs with role and content"), "{message}");

    let without = scratch.checkpoint("cls-window-sharded");
    std::fs::remove_file(without.join("chat_template.jinja")).unwrap();
    let message = with(78, without.to_str().unwrap(), &["--chat-column", "chat"]);
    assert!(message.contains("tokenizer_config.json") && message.contains("chat_template"), "{message}");
    std::fs::write(without.join("chat_template.jinja"), "{% for %}").unwrap();
    let message = with(78, without.to_str().unwrap(), &["--chat-column", "chat"]);
    assert!(message.contains("chat_template.jinja") && message.contains("line 1"), "{message}");
}

#[test]
fn sources_of_prompts_exclude_each_other() {
    let args = ["classify", "-i", "in.parquet", "-o", "out", "--model", "model"];
    for extra in [
        &["--prompt-template", "{a}", "--chat-column", "b"][..],
        &["--prompt-template", "{a}", "--text-column", "text"],
        &["--chat-column", "a", "--text-column", "b"],
        &["--system", "S"],
        &["--system", "S", "--prompt-template", "{a}"],
    ] {
        let output = run(&[&args[..], extra].concat());
        assert_eq!(output.status.code(), Some(64), "{extra:?}");
    }
}

#[test]
fn another_prompt_is_another_job() {
    let scratch = Scratch::new();
    let model = scratch.checkpoint("cls-window-sharded");
    let model = model.to_str().unwrap();
    let chat = texts(&[Some(r#"[{"role": "user", "content": "Hi there"}]"#)]);
    let input = scratch.parquet("in.parquet", vec![("n", numbers(1)), ("chat", chat)]);
    classify(&scratch, &input, "out", model, &["--chat-column", "chat"]);
    let output = scratch.arg("out");
    let again = |extra: &[&str]| {
        let args = ["classify", "-i", &input, "-o", &output, "--model", model, "--keep", "n", "--resume"];
        [&args[..], extra].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let strs = |args: Vec<String>| -> String { fail(78, &args.iter().map(String::as_str).collect::<Vec<_>>()) };
    assert!(strs(again(&["--chat-column", "chat", "--system", "S"])).contains("system"));
    assert!(strs(again(&["--prompt-template", "{chat}"])).contains("prompt"));
    let jinja = std::path::Path::new(model).join("chat_template.jinja");
    std::fs::write(&jinja, std::fs::read_to_string(&jinja).unwrap() + "!").unwrap();
    assert!(strs(again(&["--chat-column", "chat"])).contains("chat_template_sha256"));
}
