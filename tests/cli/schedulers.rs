//! The examples in jobs/schedulers: whatever can be parsed is parsed, and every command in them is run with --dry-run.

use std::process::{Command, Output, Stdio};

use serde_json::Value;

use super::support::*;

fn example(name: &str) -> String {
    std::fs::read_to_string(project("jobs/schedulers").join(name)).unwrap()
}

/// A program of the machine, when it has it: an example is then checked by what will read it.
fn tool(name: &str, args: &[&str]) -> Option<Output> {
    match Command::new(name).args(args).stdin(Stdio::null()).output() {
        Ok(output) => Some(output),
        Err(error) => {
            eprintln!("not checked with {name}: {error}");
            None
        }
    }
}

/// Runs a command line of an example in a shell, as a dry run, with this program and this project in place of installed ones.
#[track_caller]
fn dry_run(shell: &str, line: &str) {
    assert!(line.contains("mistral-batch run ") || line.contains("mistral-batch check "), "{line}");
    let scratch = Scratch::new();
    let project = project("");
    let project = project.to_str().unwrap().trim_end_matches('/');
    let line = line
        .replace("/usr/local/bin/mistral-batch", "mistral-batch")
        .replace("target/release/mistral-batch", "mistral-batch")
        .replace("mistral-batch run ", "mistral-batch run --dry-run ")
        .replace("/opt/mistral-batch", project)
        .replace("/var/lib/mistral-batch", &scratch.arg("lib"))
        .replace("/var/log/mistral-batch.log", &scratch.arg("log"))
        .replace("/dev/termination-log", &scratch.arg("termination-log"))
        .replace("=results", &format!("={}", scratch.arg("results")))
        .replace("--report report.json", &format!("--report {}", scratch.arg("report.json")));
    std::fs::create_dir_all(scratch.path("lib")).unwrap();
    let binaries = std::path::Path::new(env!("CARGO_BIN_EXE_mistral-batch")).parent().unwrap();
    let mut command = program(&[]);
    let environment: Vec<_> = command.get_envs().map(|(name, _)| name.to_owned()).collect();
    command = Command::new(shell);
    for name in environment {
        command.env_remove(name);
    }
    let path = format!("{}:{}", binaries.display(), std::env::var("PATH").unwrap());
    command.env("PATH", path).env("GITHUB_STEP_SUMMARY", scratch.path("summary")).current_dir(project);
    let output = command.args(["-c", &line]).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let summary = std::fs::read_to_string(scratch.path("summary")).unwrap_or_default();
    assert!(output.status.success(), "{line}:\n{said}");
    assert!(format!("{said}{summary}").contains("nothing was written"), "{line}:\n{said}");
    if line.contains(" run ") && line.contains("--report") {
        let report = line.split("--report ").nth(1).unwrap().split(' ').next().unwrap();
        let report: Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
        assert_eq!(report["status"], "checked");
    }
}

#[test]
fn crontab() {
    let text = example("crontab");
    let entries: Vec<&str> =
        text.lines().filter(|line| !line.starts_with('#') && line.starts_with(|c: char| c.is_ascii_digit())).collect();
    assert_eq!(entries.len(), 2);
    for entry in entries {
        let fields: Vec<&str> = entry.splitn(6, ' ').collect();
        assert!(fields[..5].iter().all(|field| *field == "*" || field.parse::<u8>().is_ok_and(|n| n < 60)), "{entry}");
        assert!(!fields[5].replace("\\%", "").contains('%'), "an unescaped % ends the command: {entry}");
        dry_run("sh", &fields[5].replace("\\%", "%"));
    }
}

#[test]
fn systemd_units() {
    let service = example("mistral-batch.service");
    let line = service.lines().find_map(|line| line.strip_prefix("ExecStart=/bin/sh -c '")).unwrap();
    let line = line.strip_suffix('\'').unwrap().replace("%%", "%").replace("$$", "$");
    dry_run("sh", &line);
    assert!(example("mistral-batch.timer").contains("OnCalendar="));
    let paths = ["mistral-batch.service", "mistral-batch.timer"].map(|name| project("jobs/schedulers").join(name));
    let paths: Vec<&str> = paths.iter().map(|path| path.to_str().unwrap()).collect();
    if let Some(verified) = tool("systemd-analyze", &[&["verify"], &paths[..]].concat()) {
        let said = String::from_utf8_lossy(&verified.stderr);
        assert!(verified.status.success() && said.trim().is_empty(), "{said}");
    }
}

/// Runs the file with classes in place of Airflow's, which say what the operators were given.
const AIRFLOW: &str = r#"
import json, sys, types
commands = []
class Context:
    def __init__(self, **settings): assert settings["dag_id"] and settings["schedule"]
    def __enter__(self): return self
    def __exit__(self, *error): pass
class Operator:
    def __init__(self, *, task_id, bash_command, **settings): commands.append(bash_command)
    def __rshift__(self, other): return other
for name in ["airflow", "airflow.providers", "airflow.providers.standard", "airflow.providers.standard.operators",
             "airflow.providers.standard.operators.bash"]:
    sys.modules[name] = types.ModuleType(name)
sys.modules["airflow"].DAG = Context
sys.modules["airflow.providers.standard.operators.bash"].BashOperator = Operator
exec(compile(open(sys.argv[1]).read(), sys.argv[1], "exec"), {"__name__": "dag"})
print(json.dumps(commands))
"#;

#[test]
fn airflow_dag() {
    let path = project("jobs/schedulers/airflow_dag.py");
    let Some(ran) = tool("python3", &["-c", AIRFLOW, path.to_str().unwrap()]) else { return };
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let commands: Vec<String> = serde_json::from_slice(&ran.stdout).unwrap();
    assert_eq!(commands.len(), 2);
    for command in commands {
        // As Airflow's templates render the day.
        dry_run("bash", &command.replace("{{ ds }}", "2026-01-01"));
    }
}

#[test]
fn kubernetes_job() {
    let text = example("kubernetes-job.yaml");
    let args = text.lines().find_map(|line| line.trim().strip_prefix("args: ")).unwrap();
    let args: Vec<String> = serde_json::from_str(args).unwrap();
    dry_run("sh", &format!("mistral-batch {}", args.join(" ")));
    if let Some(job) = yaml("kubernetes-job.yaml") {
        assert_eq!((&job["apiVersion"], &job["kind"]), (&"batch/v1".into(), &"Job".into()));
        let pod = &job["spec"]["template"]["spec"];
        assert_eq!(pod["containers"][0]["args"], serde_json::to_value(&args).unwrap());
        assert_eq!(pod["restartPolicy"], "Never", "a podFailurePolicy needs it");
        let codes = &job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"];
        assert_eq!(codes["containerName"], pod["containers"][0]["name"]);
        // Every exit code but those of success and of what may go through again.
        assert_eq!(codes["values"], serde_json::json!([64, 65, 66, 69, 70, 73, 74, 78]));
    }
}

#[test]
fn containerfile() {
    let text = example("Containerfile");
    let mut stages = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let words: Vec<&str> = line.split(' ').collect();
        match words[0] {
            "FROM" => stages.push(words.get(3).copied()),
            "COPY" if words[1].starts_with("--from=") => assert!(stages.contains(&words[1].strip_prefix("--from="))),
            "COPY" => {
                for source in &words[1..words.len() - 1] {
                    assert!(project(source).exists(), "COPY {source}");
                }
            }
            "WORKDIR" | "RUN" | "USER" => {}
            "ENTRYPOINT" => {
                let program: Vec<String> = serde_json::from_str(line.strip_prefix("ENTRYPOINT ").unwrap()).unwrap();
                assert!(text.contains(&format!(" {}\n", program[0])), "nothing is copied to {}", program[0]);
            }
            other => panic!("{other} is no instruction"),
        }
    }
    assert_eq!(stages, [Some("build"), None]);
    let toolchain = format!("rust:{}", env!("CARGO_PKG_RUST_VERSION"));
    assert!(text.contains(&toolchain), "the compiler that Cargo.toml asks for: {toolchain}");
}

#[test]
fn github_actions_workflow() {
    let text = example("github-actions.yml");
    let commands: Vec<&str> = text.lines().map(str::trim).filter(|line| line.starts_with("target/release/")).collect();
    assert_eq!(commands.len(), 2);
    commands.into_iter().for_each(|command| dry_run("bash", command));
    if let Some(workflow) = yaml("github-actions.yml") {
        let steps = workflow["jobs"]["classify"]["steps"].as_array().unwrap();
        assert!(steps.iter().all(|step| step["uses"].is_string() != step["run"].is_string()), "{steps:?}");
    }
}

#[test]
fn prometheus_alerts() {
    let Some(rules) = yaml("prometheus-alerts.yml") else { return };
    let rules = rules["groups"][0]["rules"].as_array().unwrap().clone();
    assert!(rules.iter().all(|rule| rule["alert"].is_string() && rule["expr"].is_string()), "{rules:?}");
}

/// A YAML file as Python reads it, where there is Python with PyYAML.
fn yaml(name: &str) -> Option<Value> {
    let path = project("jobs/schedulers").join(name);
    // YAML 1.1 reads the key `on` as true, which no JSON key is.
    let script = "import json, sys\ntry:\n    import yaml\nexcept ImportError:\n    sys.exit(3)\n\
                  print(json.dumps({str(k): v for k, v in yaml.safe_load(open(sys.argv[1])).items()}))";
    let parsed = tool("python3", &["-c", script, path.to_str().unwrap()])?;
    if parsed.status.code() == Some(3) {
        eprintln!("not checked: Python has no PyYAML");
        return None;
    }
    assert!(parsed.status.success(), "{}", String::from_utf8_lossy(&parsed.stderr));
    Some(serde_json::from_slice(&parsed.stdout).unwrap())
}
