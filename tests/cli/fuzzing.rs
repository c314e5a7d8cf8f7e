//! The fuzzing targets of `fuzz/`, run over damaged seeds: no input makes one panic. A process of its own is not needed, since a
//! panic fails the test, and nothing here decodes data.

use std::time::{Duration, Instant};

use super::support::{checkpoint, project};

#[path = "fuzz_targets.rs"]
mod targets;

/// As many damaged files for each seed.
const TIMES: u64 = 1_500;

fn random(state: &mut u64) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) as usize
}

/// Words that mean something to the formats at hand, put where they do not belong.
const WORDS: [&[u8]; 16] = [
    b"null",
    b"-1",
    b"18446744073709551615",
    b"1e309",
    b"\"\"",
    b"{}",
    b"[[[[[[[[",
    b"${",
    b"${a:-${b}}",
    b"{% for x in messages %}",
    b"{{ messages",
    b"~ x ~ x",
    b"\xff",
    b"../",
    b"= [",
    b"0.0000001",
];

fn damaged(seed: &[u8], state: &mut u64) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..=random(state) % 4 {
        let place = random(state) % bytes.len().max(1);
        let end = (place + random(state) % 16).min(bytes.len());
        match random(state) % 5 {
            0 => bytes.truncate(place),
            1 => drop(bytes.drain(place..end)),
            2 => drop(bytes.splice(place..end, WORDS[random(state) % WORDS.len()].iter().copied())),
            3 => {
                let copied = bytes[place..end].to_vec();
                let to = random(state) % (bytes.len() + 1);
                drop(bytes.splice(to..to, copied));
            }
            _ => {
                if let Some(byte) = bytes.get_mut(place) {
                    *byte ^= 1 << (random(state) % 8);
                }
            }
        }
    }
    bytes
}

fn fuzz(target: fn(&[u8]), seeds: &[Vec<u8>]) {
    let mut state = 7;
    for seed in seeds {
        target(seed);
        for _ in 0..TIMES {
            let bytes = damaged(seed, &mut state);
            let started = Instant::now();
            target(&bytes);
            assert!(
                started.elapsed() < Duration::from_secs(10),
                "took too long: {:?}",
                String::from_utf8_lossy(&bytes)
            );
        }
    }
}

#[test]
fn a_plan_that_is_anything() {
    let plan = serde_json::json!({
        "version": "1", "fingerprint": "f", "settings": {"settings": {"max_length": 256}, "list": [1, {"a": null}]},
        "notes": {"threads": 8}, "inputs": [{"path": "in.parquet", "size": 11}], "unit_rows": 2, "units": 2, "rows": 4,
    });
    fuzz(targets::plan, &[plan.to_string().into_bytes()]);
}

#[test]
fn a_job_file_that_is_anything() {
    let file = |name: &str| std::fs::read(project("jobs").join(name)).unwrap();
    fuzz(targets::job_file, &[file("classify.toml"), file("generate.toml")]);
}

#[test]
fn a_checkpoint_that_is_anything() {
    let file = |which: u8, path: String| [vec![which], std::fs::read(path).unwrap()].concat();
    let folder = checkpoint("cls-window-sharded");
    let mut weights = file(1, format!("{folder}/model-00001-of-00003.safetensors"));
    let header = u64::from_le_bytes(weights[1..9].try_into().unwrap()) as usize;
    weights.truncate(9 + header + 64);
    fuzz(
        targets::checkpoint,
        &[file(0, format!("{folder}/config.json")), weights, file(2, format!("{folder}/model.safetensors.index.json"))],
    );
}

#[test]
fn a_chat_template_that_is_anything() {
    let template = std::fs::read(checkpoint("lm-window") + "/chat_template.jinja").unwrap();
    let chat =
        br#"[{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "ho"}]}]"#;
    fuzz(targets::chat_template, &[[&template[..], &[0], chat].concat(), template]);
}
