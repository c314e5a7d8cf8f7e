//! `mistral-batch sql` from outside.

use std::io::Write;

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::support::project;

const MODELS: [&str; 6] = [
    "--model",
    "tickets=sample-data/models/ticket-classifier",
    "--model",
    "sample-data/models/digit-sorter",
    "--model",
    "pii=sample-data/models/pii-tagger",
];

fn program(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mistral-batch"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("MISTRAL_BATCH_")) {
        command.env_remove(name);
    }
    command.current_dir(project("")).arg("sql").args(MODELS).args(args).stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    program(args).output().unwrap()
}

#[track_caller]
fn succeed(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn fail(code: i32, args: &[&str]) -> String {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    let message = stderr.lines().last().unwrap();
    message.strip_prefix("error: ").unwrap_or_else(|| panic!("not an error message: {stderr}")).to_owned()
}

#[test]
fn every_format_holds_the_same_rows() {
    let query =
        "SELECT id, ai_classify(text) AS c FROM 'sample-data/tickets.parquet' WHERE id < 'row-00002' ORDER BY id";
    let csv = succeed(&["-c", query, "--format", "csv"]);
    let lines: Vec<_> = csv.lines().collect();
    assert_eq!((lines[0], lines.len()), ("id,c", 3), "{csv}");
    assert!(lines[1].starts_with("row-00000,\"{\"\"label\"\":\"\""), "{csv}");
    let json = succeed(&["-c", query, "--format", "json"]);
    let rows: Vec<serde_json::Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 2);
    let label = rows[0]["c"]["label"].as_str().unwrap();
    assert!(lines[1].contains(label) && rows[0]["c"]["error"].is_null());
    let table = succeed(&["-c", query]);
    assert!(table.starts_with("+--") && table.contains(label), "{table}");
    let parquet = run(&["-c", query, "--format", "parquet"]).stdout;
    assert_eq!((&parquet[..4], &parquet[parquet.len() - 4..]), (&b"PAR1"[..], &b"PAR1"[..]));
}

#[test]
fn scripts_copies_and_external_tables() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name).to_str().unwrap().to_owned();
    let script = format!(
        "CREATE EXTERNAL TABLE t STORED AS PARQUET LOCATION 'sample-data/tickets.parquet';
         COPY (SELECT id, ai_classify(text).label AS label FROM t WHERE id < 'row-00010') TO '{out}' STORED AS PARQUET;
         CREATE TABLE labels AS SELECT * FROM '{out}';
         SELECT count(*) AS n FROM labels;
         SELECT count(*) AS loaded FROM mistral.models WHERE loaded;",
        out = path("labels.parquet")
    );
    std::fs::write(path("script.sql"), &script).unwrap();
    let out = succeed(&["-f", &path("script.sql"), "--format", "csv"]);
    assert!(out.contains("n\n10\n") && out.contains("loaded\n1\n"), "{out}");

    // Standard input is a script, too.
    let mut child = program(&["--format", "csv", "-q"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"SELECT 1 AS one; SELECT 2 AS two").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "one\n1\ntwo\n2\n");
}

#[test]
fn results_equal_those_of_the_commands() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name).to_str().unwrap().to_owned();
    let command = |args: &[&str]| {
        let output =
            Command::new(env!("CARGO_BIN_EXE_mistral-batch")).current_dir(project("")).args(args).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let (classified, scored) = (path("classified"), path("scored"));
    let (tagged, embedded) = (path("tagged"), path("embedded.parquet"));
    let tickets = ["-i", "sample-data/tickets.parquet", "--model"];
    command(&[&["classify"], &tickets[..], &["sample-data/models/ticket-classifier", "-o", &classified]].concat());
    command(&[&["score"], &tickets[..], &["sample-data/models/digit-sorter", "-o", &scored]].concat());
    command(
        &[&["embed"], &tickets[..], &["sample-data/models/digit-sorter", "-o", &embedded, "--limit", "100"]].concat(),
    );
    let pii = ["tag", "-i", "sample-data/pii.parquet", "--model", "sample-data/models/pii-tagger", "-o", &tagged];
    command(&[&pii[..], &["--aggregation", "simple"]].concat());
    // Whole folders as tables, _plan.json and all. Other batches round otherwise: within 1e-5 of the commands'.
    let query = format!(
        "SELECT count(*) AS n, count(*) FILTER (WHERE c.label = predicted_label AND abs(c.score - predicted_score) < 1e-5) AS same
         FROM (SELECT *, ai_classify(text, 'tickets') AS c FROM '{classified}');
         SELECT count(*) AS n, count(*) FILTER (WHERE abs(l - logprob) < 1e-4 * abs(logprob)) AS same
         FROM (SELECT *, ai_logprob(text, 'digit-sorter') AS l FROM '{scored}');
         SELECT count(*) AS n, count(*) FILTER (WHERE abs(v[1] - embedding[1]) + abs(v[128] - embedding[128]) < 1e-4) AS same
         FROM (SELECT *, ai_embed(text, 'digit-sorter') AS v FROM '{embedded}');
         SELECT count(*) AS n, count(*) FILTER (WHERE e = entities) AS same
         FROM (SELECT *, ai_tag(text, 'pii') AS e FROM '{tagged}');"
    );
    let out = succeed(&["-c", &query, "--format", "csv", "-q"]);
    assert_eq!(out, "n,same\n1000,1000\nn,same\n1000,1000\nn,same\n100,100\nn,same\n600,600\n");
}

#[test]
fn the_first_failing_statement_ends_the_program_with_its_code() {
    let message = fail(64, &["-c", "SELECT 1; SELECT missing FROM 'sample-data/tickets.parquet'; SELECT 3"]);
    assert!(message.starts_with("statement 2: ") && message.contains("missing"), "{message}");
    for (code, query, says) in [
        (64, "SELEC 1", "SQL"),
        (64, "SELECT ai_classify(text, 'ticket') FROM 'sample-data/tickets.parquet'", "did you mean 'tickets'?"),
        (66, "SELECT * FROM 'nowhere/at/all.parquet'", "no such file or folder"),
        (65, "SELECT 1 / (id - id) FROM (VALUES (1)) AS t(id)", "ivide by zero"),
        (
            65,
            "SET mistral.on_error = 'fail'; SELECT ai_generate([{role: 'x', content: 'y'}], 'digit-sorter')",
            "a row failed",
        ),
        (78, "SET mistral.models.x = '/nowhere'", "no such folder"),
    ] {
        let message = fail(code, &["-c", query]);
        assert!(message.contains(says), "{query}: {message}");
    }
    assert!(fail(66, &["-f", "nowhere.sql"]).contains("nowhere.sql"));
    assert!(fail(64, &["-c", "SELECT 1; SELECT 2", "--format", "parquet"]).contains("one statement's rows"));
    assert!(fail(69, &["-c", "SELECT 1", "--device", "cuda:0"]).contains("cuda:0"));
}

#[test]
fn an_interrupt_cancels_the_query() {
    let query = "SELECT ai_classify(a.text || b.text).label FROM 'sample-data/tickets.parquet' a
                 CROSS JOIN 'sample-data/tickets.parquet' b";
    let mut child =
        program(&["-c", query, "--progress", "json"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    // Told at the first line of progress, when the model is at work.
    let mut stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut stderr, &mut line).unwrap();
    assert!(line.contains("rows_inferred"), "{line}");
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "still running");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status.code(), Some(130));
}

#[test]
fn the_documents_examples_run_as_written() {
    let page = std::fs::read_to_string(project("docs/sql.md")).unwrap();
    let mut run_any = false;
    for block in page.split("```sql\n").skip(1) {
        let query = block.split("```").next().unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let query = query.replace("target/", &format!("{}/", scratch.path().to_str().unwrap()));
        succeed(&["-c", &query]);
        run_any = true;
    }
    assert!(run_any);
}
