use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use arrow::array::{ListBuilder, StringArray, StringBuilder, StructBuilder};
use serde_json::json;

use super::*;
use crate::text::TextTokenizer;

fn project(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read_json(path: &str) -> Json {
    serde_json::from_str(&std::fs::read_to_string(project(path)).unwrap()).unwrap()
}

fn template(source: &str) -> ChatTemplate {
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")];
    ChatTemplate::new(source, tokens.map(|(name, token)| (name, token.to_owned())).to_vec()).unwrap()
}

/// What the template makes of one user message.
fn render(source: &str) -> Result<String, String> {
    template(source).render(&parse_messages(r#"[{"role": "user", "content": "Hi"}]"#).unwrap(), true)
}

#[test]
fn renderings_equal_those_of_transformers_byte_for_byte() {
    let golden = read_json("tests/goldens/chat.json");
    let mut failures = 0;
    for case in golden["renderings"].as_array().unwrap() {
        let name = case["template"].as_str().unwrap();
        let template = template(golden["templates"][name].as_str().unwrap());
        let messages = parse_messages(&golden["chats"][case["chat"].as_str().unwrap()].to_string()).unwrap();
        let ours = template.render(&messages, case["add_generation_prompt"].as_bool().unwrap());
        let what = format!("{name} of {}", case["chat"]);
        match case["rendered"].as_str() {
            Some(theirs) => assert_eq!(ours.as_deref(), Ok(theirs), "{what}"),
            None => assert!(ours.is_err(), "{what}: transformers refuses it, {}: {ours:?}", case["error"]),
        }
        failures += usize::from(case["rendered"].is_null());
    }
    assert!(failures > 10);
}

#[test]
fn the_goldens_chats_become_the_ids_of_transformers() {
    for (tokenizer, checkpoint) in
        [("tok1k", "cls-window-sharded"), ("tok1k-nopad", "cls-nopad"), ("tok4k", "cls-pad-is-eos")]
    {
        let dir = project("tests/goldens/checkpoints").join(checkpoint);
        let tokenizer_of = TextTokenizer::open(&dir, usize::MAX).unwrap();
        let template = tokenizer_of.chat_template().unwrap();
        let golden = read_json(&format!("tests/goldens/goldens/tokenizer-{tokenizer}.json"));
        let chats = golden["chat"].as_array().unwrap();
        assert!(chats.len() > 10);
        for chat in chats {
            let messages = parse_messages(&chat["messages"].to_string()).unwrap();
            let text = template.render(&messages, chat["add_generation_prompt"].as_bool().unwrap());
            if let Some(error) = chat["error"].as_str() {
                assert!(text.unwrap_err().contains(error), "{error}");
                continue;
            }
            let text = text.unwrap();
            assert_eq!(text, chat["rendered"].as_str().unwrap());
            let ids = tokenizer_of.tokenize_with(&text, false).unwrap().chunks.remove(0);
            assert_eq!(json!(ids), chat["input_ids"], "one BOS: {text:?}");
        }
    }
}

/// Role, if any, and content of each message.
type Turns<'a> = &'a [(Option<&'a str>, &'a str)];

/// A column of chats as lists of structs with `role`, `content` and `name`, which is null.
fn chats(rows: &[Option<Turns>]) -> ArrayRef {
    let fields = ["role", "content", "name"].map(|name| Field::new(name, DataType::Utf8, true));
    let mut builder = ListBuilder::new(StructBuilder::from_fields(Fields::from(fields.to_vec()), 0));
    for row in rows {
        for (role, content) in row.unwrap_or_default() {
            let message = builder.values();
            for (place, value) in [*role, Some(*content), None].into_iter().enumerate() {
                message.field_builder::<StringBuilder>(place).unwrap().append_option(value);
            }
            message.append(true);
        }
        builder.append(row.is_some());
    }
    Arc::new(builder.finish())
}

fn texts(prompts: Vec<Prompt>) -> Vec<Option<String>> {
    let text = |prompt| match prompt {
        Prompt::Null => None,
        Prompt::Text { text, add_special_tokens: false } => Some(text.into_owned()),
        Prompt::Failed(message) => Some(format!("! {message}")),
        other => panic!("{other:?}"),
    };
    prompts.into_iter().map(text).collect()
}

/// Prints role and content of each message, and whether an answer is asked for.
const PLAIN: &str = "{% for m in messages %}{{ m.role }}={{ m.content }}|{% endfor %}{{ add_generation_prompt }}";

#[test]
fn lists_of_structs_and_their_json_are_the_same_chats() {
    let template = template(PLAIN);
    let columns: [ArrayRef; 2] = [
        chats(&[
            Some(&[(Some("user"), "é \"x\"\n")]),
            None,
            Some(&[(Some("user"), "a"), (Some("assistant"), "b")]),
            Some(&[(None, "a")]),
            Some(&[]),
        ]),
        Arc::new(StringArray::from(vec![
            Some(r#"[{"role": "user", "content": "é \"x\"\n"}]"#),
            None,
            Some(r#"[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]"#),
            Some(r#"[{"content": "a"}]"#),
            Some("[]"),
        ])),
    ];
    for column in columns {
        assert!(ChatTemplate::accepts(column.data_type()));
        let prompts = texts(template.prompts(&column, None).unwrap());
        let expected = [
            Some("user=é \"x\"\n|True"),
            None,
            Some("user=a|assistant=b|False"),
            Some("! message 1 of the chat has no role"),
            Some("True"),
        ];
        assert_eq!(prompts, expected.map(|text| text.map(str::to_owned)));
    }
}

#[test]
fn a_system_message_goes_before_chats_without_one() {
    let column = chats(&[Some(&[(Some("user"), "a")]), Some(&[(Some("system"), "own"), (Some("user"), "a")]), None]);
    let prompts = texts(template(PLAIN).prompts(&column, Some("S")).unwrap());
    assert_eq!(prompts, [Some("system=S|user=a|True".into()), Some("system=own|user=a|True".into()), None]);
}

#[test]
fn bad_chats_fail_their_rows_and_no_others() {
    let column: ArrayRef = Arc::new(StringArray::from(vec![
        "[{\"role\": \"user\", \"content\": \"a\"",
        "{\"role\": \"user\"}",
        "[\"a\"]",
        "[{\"role\": 7}]",
        "[{\"role\": \"user\", \"content\": \"a\"}]",
    ]));
    let prompts = texts(template(PLAIN).prompts(&column, None).unwrap());
    let starts = [
        "! the chat is not JSON: EOF",
        "! the chat is not a JSON array of messages",
        "! message 1 of the chat is not an object",
        "! message 1 of the chat has no role",
        "user=a|True",
    ];
    for (prompt, start) in prompts.iter().zip(starts) {
        assert!(prompt.as_ref().unwrap().starts_with(start), "{prompt:?}");
    }
}

#[test]
fn columns_that_hold_no_chats_are_not_accepted() {
    let list = |item: DataType| DataType::List(Arc::new(Field::new_list_field(item, true)));
    let message =
        |names: &[&str]| DataType::Struct(names.iter().map(|name| Field::new(*name, DataType::Utf8, true)).collect());
    assert!(ChatTemplate::accepts(&list(message(&["content", "extra", "role"]))));
    assert!(!ChatTemplate::accepts(&list(message(&["role", "text"]))));
    assert!(!ChatTemplate::accepts(&list(DataType::Utf8)));
    assert!(!ChatTemplate::accepts(&message(&["role", "content"])));
    assert!(!ChatTemplate::accepts(&DataType::Int64));
}

#[test]
fn a_template_that_does_not_end_fails_its_row() {
    let started = Instant::now();
    let looping = "{% for a in range(90000) %}{% for b in range(90000) %}{% for c in range(90000) %}\
        {% set x = a * b %}{% endfor %}{% endfor %}{% endfor %}";
    assert_eq!(render(looping).unwrap_err(), "the chat template did not end within 5000000 steps");
    let recursive = "{% macro f(x) %}{{ f(x + 1) }}{% endmacro %}{{ f(1) }}";
    assert!(render(recursive).unwrap_err().starts_with("the chat template failed: "));
    let mutual = "{% macro g() %}{{ f() }}{% endmacro %}{% macro f() %}{% for x in [1] %}{{ g() }}{% endfor %}\
        {% endmacro %}{{ f() }}";
    assert!(render(mutual).unwrap_err().starts_with("the chat template failed: "));
    let itself = r#"{% include "chat" %}"#;
    assert!(render(itself).unwrap_err().starts_with("the chat template failed: "));
    assert_eq!(render("{{ 'abc'.count('') }}").unwrap(), "4");
    assert!(started.elapsed().as_secs() < 20);
}

#[test]
fn what_a_template_raises_stands_in_the_error() {
    let message = render("{% if true %}\n{{ raise_exception('roles must\nalternate') }}{% endif %}").unwrap_err();
    assert_eq!(message, "the chat template failed: roles must (line 2 of the template)");
    let message = render("{{ messages[0]['x']['y'] }}").unwrap_err();
    assert_eq!(message, "the chat template failed: undefined value (line 1 of the template)");
    let message = render("{% include 'other.txt' %}").unwrap_err();
    assert!(message.starts_with("the chat template failed: template not found"), "{message}");
    // minijinja 2.24 panics here; Python has the empty list.
    assert_eq!(render("{{ [][::-1] }}").unwrap_err(), "the chat template made its engine panic");
}

#[test]
fn strftime_now_knows_the_time_of_the_run() {
    let template = template("{{ strftime_now('%Y-%m-%d') }}");
    let today = template.render(&[], true).unwrap();
    assert_eq!((today.len(), today.as_bytes()[4]), (10, b'-'));
    assert!(render("{{ strftime_now('%Q') }}").unwrap_err().contains("does not know '%Q'"));
}

#[test]
fn a_syntax_error_names_its_line() {
    let message = ChatTemplate::new("a\n{% if %}", Vec::new()).unwrap_err();
    assert!(message.starts_with("syntax error") && message.ends_with("(line 2 of the template)"), "{message}");
}

#[test]
fn the_template_is_found_where_transformers_finds_it() {
    let scratch = tempfile::tempdir().unwrap();
    let from = project("tests/goldens/checkpoints/cls-nopad");
    for name in ["tokenizer.json", "special_tokens_map.json"] {
        std::fs::copy(from.join(name), scratch.path().join(name)).unwrap();
    }
    let with_config = |template: Json| {
        let config = json!({ "bos_token": "<s>", "chat_template": template }).to_string();
        std::fs::write(scratch.path().join("tokenizer_config.json"), config).unwrap();
        TextTokenizer::open(scratch.path(), usize::MAX).unwrap().chat_template()
    };
    let rendered = |template: Result<ChatTemplate>| template.unwrap().render(&[], true).unwrap();
    assert_eq!(rendered(with_config(json!("{{ bos_token }}1{{ eos_token }}{{ unk_token }}"))), "<s>1</s><unk>");
    let named = json!([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]);
    assert_eq!(rendered(with_config(named)), "d");
    for none in [json!(null), json!([{"name": "rag", "template": "r"}]), json!(7), json!("{% if %}")] {
        let error = with_config(none).unwrap_err();
        assert_eq!(error.exit_code(), crate::ExitCode::Config);
        assert!(error.to_string().contains("tokenizer_config.json"), "{error}");
    }
    std::fs::write(scratch.path().join("chat_template.jinja"), "file").unwrap();
    assert_eq!(rendered(with_config(json!("config"))), "file", "the file goes first");
}
