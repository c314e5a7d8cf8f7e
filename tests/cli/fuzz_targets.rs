//! What is fuzzed: files that come from elsewhere and are read before anything is known of them. A target may return as it
//! likes; it must not panic, hang, or allocate what its input is not worth.
//!
//! `cargo fuzz` runs each by itself; `tests/cli/fuzzing.rs` runs all of them over damaged seeds with every `cargo test`.

#![allow(dead_code)] // each program uses one of them

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::path::Path;

use mistral_batch::data::plan_file::PlanFile;
use mistral_batch::job::{JobFile, Variables};
use mistral_batch::model::{MistralConfig, Weights};
use mistral_batch::text::{ChatTemplate, parse_messages};
use serde_json::json;

/// `_plan.json` of an output that may be anybody's: read, and compared with our own.
pub fn plan(bytes: &[u8]) {
    let Ok(theirs) = serde_json::from_slice::<PlanFile>(bytes) else { return };
    let inputs = json!([{"path": "in.parquet", "size": 10}]);
    let ours = PlanFile::new(json!({"settings": {"max_length": 128}}), json!({"threads": 1}), inputs, 2, 2, 4);
    let _ = (ours.compare(&theirs), ours.changed_note(&theirs), theirs.rows_digest());
}

/// A job file, with a variable that it may use.
pub fn job_file(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let variables = Variables::new(BTreeMap::from([("date".to_owned(), "2026-01-01".to_owned())]));
    if let Ok(file) = JobFile::parse(Path::new("job.toml"), "/nowhere".into(), text) {
        let _ = (file.job(&variables), file.messages(&variables));
    }
}

thread_local! {
    static FOLDER: OnceCell<tempfile::TempDir> = const { OnceCell::new() };
}

/// A checkpoint's files: the first byte says which.
pub fn checkpoint(bytes: &[u8]) {
    let Some((which, content)) = bytes.split_first() else { return };
    let name = match which % 3 {
        0 => {
            let Ok(text) = std::str::from_utf8(content) else { return };
            if let Ok(config) = MistralConfig::parse(text) {
                let _ = (config.activation_bytes(1), config.heads(), config.num_labels());
            }
            return;
        }
        1 => "model.safetensors",
        _ => "model.safetensors.index.json",
    };
    FOLDER.with(|folder| {
        let Ok(folder) = folder.get().map_or_else(|| tempfile::tempdir().map(|new| folder.get_or_init(|| new)), Ok)
        else {
            return;
        };
        let path = folder.path().join(name);
        if std::fs::write(&path, content).is_ok() {
            if let Ok(weights) = Weights::open(folder.path()) {
                let _ =
                    (weights.num_parameters(), weights.dtypes(), weights.identity_sha256(), weights.names().count());
            }
            let _ = std::fs::remove_file(&path);
        }
    });
}

/// A chat template, run on a chat; what comes before the first NUL is the template, the rest a chat as JSON.
pub fn chat_template(bytes: &[u8]) {
    let mut parts = bytes.splitn(2, |&byte| byte == 0).map(String::from_utf8_lossy);
    let (source, chat) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let Ok(template) = ChatTemplate::new(&source, vec![("bos_token", "<s>".to_owned())]) else { return };
    let messages = parse_messages(&chat).or_else(|_| parse_messages(r#"[{"role": "user", "content": "hi"}]"#));
    let _ = template.render(&messages.unwrap_or_default(), true);
}
