#![no_main]

#[path = "../../tests/cli/fuzz_targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| targets::plan(bytes));
