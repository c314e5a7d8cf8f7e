//! `--memory-limit`: what it cuts, what it refuses, and that results stay what they are.

use super::support::*;

#[test]
fn a_limit_cuts_batches_and_windows_and_changes_no_result() {
    let scratch = Scratch::new();
    let texts: Vec<String> = (0..3000).map(|row| "some words ".repeat(1 + row * 7 % 60) + &row.to_string()).collect();
    let input = scratch.texts("in.parquet", texts.iter().map(|text| Some(text.as_str())));
    let model = checkpoint("cls-window-sharded");
    let classify = |name: &str, extra: &[&str]| {
        let output = scratch.arg(name);
        let args = ["classify", "-i", &input, "-o", &output, "--model", &model];
        let said = succeed(&[&args[..], extra].concat());
        (said, read_parquet(&output))
    };
    let (said, whole) = classify("whole", &[]);
    assert!(!said.contains("memory limit"), "{said}");
    let (said, ample) = classify("ample", &["--memory-limit", "16G"]);
    assert!(said.contains("memory limit 16384 MiB: batches of 4096 tokens, windows of 64 MiB"), "{said}");
    assert!(ample == whole);
    let (said, tight) = classify("tight", &["--memory-limit", "132M"]);
    assert!(said.contains("memory limit 132 MiB: batches of ") && !said.contains("windows of 64 MiB"), "{said}");
    assert_eq!(strings(&tight, "predicted_label"), strings(&whole, "predicted_label"));
    for (row, (a, b)) in floats(&tight, "predicted_score").iter().zip(floats(&whole, "predicted_score")).enumerate() {
        assert!((a.unwrap() - b.unwrap()).abs() < 1e-5, "row {row}");
    }

    // It is not part of what the job is: a run may be resumed with another one.
    let output = scratch.arg("whole");
    let args = ["classify", "-i", &input, "-o", &output, "--model", &model, "--memory-limit", "200M"];
    assert!(succeed(&args).contains("nothing to do"));

    let refused =
        fail(64, &["classify", "-i", &input, "-o", &scratch.arg("x"), "--model", &model, "--memory-limit", "64M"]);
    assert!(refused.contains("--memory-limit 64 MiB is too little") && refused.contains("of weights"), "{refused}");
    assert!(!scratch.path("x").exists());
    let job = format!(
        "command = 'classify'\nmodel = '{model}'\ninput = ['{input}']\noutput = 'from-file'\nmemory_limit = '132M'\n"
    );
    let job = scratch.write("job.toml", job);
    let checked = run(&["check", &job]);
    let checked = String::from_utf8(checked.stdout).unwrap();
    assert!(checked.contains("memory limit 132 MiB: batches of "), "{checked}");
}

#[test]
fn what_a_run_takes_stays_under_the_limit() {
    // Rows of 20 kB: windows of 64 MiB of them, many times over, would be far beyond it.
    let scratch = Scratch::new();
    let texts: Vec<String> =
        (0..6000).map(|row| format!("row {row} {}", "some words of a long text ".repeat(800))).collect();
    let input = scratch.texts("in.parquet", texts.iter().map(|text| Some(text.as_str())));
    let (model, output) = (checkpoint("cls-nopad"), scratch.arg("out"));
    let script = "\"$@\" & child=$!; peak=0
         while kill -0 $child 2>/dev/null; do
           now=$(grep -o 'VmHWM:[[:space:]]*[0-9]*' /proc/$child/status 2>/dev/null | grep -o '[0-9]*$') && peak=${now:-$peak}; sleep 0.02
         done
         echo $peak; wait $child";
    let peak_kib = |limit: &str| -> u64 {
        let program = env!("CARGO_BIN_EXE_mistral-batch");
        let args =
            ["classify", "-i", &input, "-o", &output, "--model", &model, "--max-length", "64", "-q", "--overwrite"];
        let mut command = std::process::Command::new("bash");
        command.args(["-c", script, "bash", program]).args(args).args(["--memory-limit", limit]);
        let ran = command.output().unwrap();
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8(ran.stdout).unwrap().trim().parse().unwrap()
    };
    let (tight, ample) = (peak_kib("200M"), peak_kib("8G"));
    assert!(tight < 200 << 10, "{tight} KiB under a limit of 200 MiB");
    assert!(ample > tight * 3 / 2, "{ample} KiB without need to save, {tight} KiB with: the limit did nothing");
}
