//! What schedulers, catalogues and monitoring are told of runs: OpenLineage events and Prometheus metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::support::*;

/// The events of a file, each checked against the rules of OpenLineage 2-0-2.
fn events(scratch: &Scratch, name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(scratch.path(name)).unwrap();
    assert!(text.ends_with('\n'), "each event is a whole line");
    let events: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    events.iter().for_each(check_event);
    events
}

/// What `$defs/RunEvent` and the facets' own schemas require.
fn check_event(event: &Value) {
    chrono::DateTime::parse_from_rfc3339(event["eventTime"].as_str().unwrap()).unwrap();
    is_uri(&event["producer"]);
    assert_eq!(event["schemaURL"], "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent");
    assert!(["START", "COMPLETE", "ABORT", "FAIL"].contains(&event["eventType"].as_str().unwrap()), "{event}");
    uuid::Uuid::parse_str(event["run"]["runId"].as_str().unwrap()).unwrap();
    check_facets(&event["run"]["facets"]);
    let is_named = |of: &Value| of["namespace"].is_string() && of["name"].is_string();
    assert!(is_named(&event["job"]), "{event}");
    check_facets(&event["job"]["facets"]);
    for (datasets, own_facets) in [("inputs", "inputFacets"), ("outputs", "outputFacets")] {
        for dataset in event[datasets].as_array().unwrap() {
            assert!(is_named(dataset), "{dataset}");
            check_facets(&dataset["facets"]);
            check_facets(&dataset[own_facets]);
        }
    }
}

fn check_facets(facets: &Value) {
    for (name, facet) in facets.as_object().into_iter().flatten() {
        is_uri(&facet["_producer"]);
        is_uri(&facet["_schemaURL"]);
        let has = |key: &str| assert!(!facet[key].is_null(), "{name} has no {key}: {facet}");
        let strings =
            |keys: &[&str]| keys.iter().for_each(|key| assert!(facet[*key].is_string(), "{name}.{key}: {facet}"));
        let schema = match name.as_str() {
            "processing_engine" => {
                strings(&["version", "name"]);
                "1-1-1/ProcessingEngineRunFacet"
            }
            "errorMessage" => {
                strings(&["message", "programmingLanguage"]);
                "1-0-1/ErrorMessageRunFacet"
            }
            "parent" => {
                uuid::Uuid::parse_str(facet["run"]["runId"].as_str().unwrap()).unwrap();
                assert!(facet["job"]["namespace"].is_string() && facet["job"]["name"].is_string());
                "1-2-0/ParentRunFacet"
            }
            "jobType" => {
                strings(&["processingType", "integration"]);
                "2-0-4/JobTypeJobFacet"
            }
            "datasetType" => {
                strings(&["datasetType"]);
                "1-0-1/DatasetTypeDatasetFacet"
            }
            "schema" => {
                assert!(facet["fields"].as_array().unwrap().iter().all(|field| field["name"].is_string()));
                "1-2-0/SchemaDatasetFacet"
            }
            "columnLineage" => {
                for field in facet["fields"].as_object().unwrap().values() {
                    for input in field["inputFields"].as_array().unwrap() {
                        assert!(["namespace", "name", "field"].iter().all(|key| input[*key].is_string()), "{input}");
                        assert!(input["transformations"][0]["type"].is_string());
                    }
                }
                has("dataset");
                "1-2-0/ColumnLineageDatasetFacet"
            }
            "inputStatistics" => {
                assert!(["rowCount", "size", "fileCount"].iter().all(|key| facet[*key].is_u64()), "{facet}");
                "1-0-0/InputStatisticsInputDatasetFacet"
            }
            "outputStatistics" => {
                assert!(["rowCount", "size", "fileCount"].iter().all(|key| facet[*key].is_u64()), "{facet}");
                "1-0-2/OutputStatisticsOutputDatasetFacet"
            }
            "mistralBatch_report" => {
                has("status");
                continue;
            }
            other => panic!("{other} is no facet of the specification"),
        };
        let kind = schema.split('/').next_back().unwrap();
        assert_eq!(facet["_schemaURL"], format!("https://openlineage.io/spec/facets/{schema}.json#/$defs/{kind}"));
    }
}

#[track_caller]
fn is_uri(value: &Value) {
    url::Url::parse(value.as_str().unwrap()).unwrap();
}

fn types(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["eventType"].as_str().unwrap()).collect()
}

#[test]
fn lineage_tells_which_data_and_which_model_made_an_output() {
    let scratch = Scratch::new();
    let (model, input) = tickets();
    let text = format!(
        "command = 'classify'\nmodel = '{model}'\ninput = ['{input}']\noutput = 'out'\nwhere = \"topic <> 'praise'\"\n\
         keep = ['id']\nunit_rows = 400\nopenlineage = 'lineage.jsonl'\n"
    );
    let job = scratch.write("label.toml", text);
    succeed(&["run", &job]);
    let told = events(&scratch, "lineage.jsonl");
    assert_eq!(types(&told), ["START", "COMPLETE"]);
    let (start, complete) = (&told[0], &told[1]);
    assert_eq!(start["run"]["runId"], complete["run"]["runId"]);
    assert_eq!((&start["job"]["namespace"], &start["job"]["name"]), (&"mistral-batch".into(), &"label".into()));
    for event in &told {
        let names: Vec<&Value> = event["inputs"].as_array().unwrap().iter().map(|dataset| &dataset["name"]).collect();
        assert_eq!(names, [&json!(input), &json!(model)]);
        assert_eq!(event["inputs"][1]["facets"]["datasetType"]["datasetType"], "MODEL");
        let dir = scratch.path("").canonicalize().unwrap();
        assert_eq!(event["outputs"][0]["name"], dir.join("out").to_str().unwrap());
    }
    let statistics = &complete["inputs"][0]["inputFacets"]["inputStatistics"];
    assert_eq!((&statistics["rowCount"], &statistics["fileCount"]), (&1000.into(), &1.into()));
    assert_eq!(statistics["size"], std::fs::metadata(&input).unwrap().len());
    let output = &complete["outputs"][0];
    let statistics = &output["outputFacets"]["outputStatistics"];
    assert_eq!((&statistics["rowCount"], &statistics["fileCount"]), (&796.into(), &3.into()));
    let columns = |dataset: &Value| -> Vec<String> {
        let fields = dataset["facets"]["schema"]["fields"].as_array().unwrap();
        fields.iter().map(|field| field["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(columns(&complete["inputs"][0]), ["id", "text", "topic"]);
    assert_eq!(columns(output), column_names(&read_parquet(scratch.path("out"))));
    let lineage = &output["facets"]["columnLineage"];
    let made_of = |column: &str| {
        let of = &lineage["fields"][column]["inputFields"][0];
        (of["field"].as_str().unwrap().to_owned(), of["transformations"][0]["subtype"].as_str().unwrap().to_owned())
    };
    assert_eq!(made_of("id"), ("id".to_owned(), "IDENTITY".to_owned()));
    assert_eq!(made_of("predicted_label"), ("text".to_owned(), "TRANSFORMATION".to_owned()));
    assert_eq!((&lineage["dataset"][0]["field"], lineage["dataset"].as_array().unwrap().len()), (&"topic".into(), 1));
    assert_eq!(complete["run"]["facets"]["mistralBatch_report"]["details"]["rows_out"], 796);

    // A rerun is a run of its own, which says that all is there.
    succeed(&["run", &job]);
    let told = events(&scratch, "lineage.jsonl");
    assert_eq!(types(&told), ["START", "COMPLETE", "START", "COMPLETE"]);
    assert_ne!(told[1]["run"]["runId"], told[3]["run"]["runId"]);
    assert_eq!(told[3]["run"]["facets"]["mistralBatch_report"]["status"], "nothing_to_do");
    assert_eq!(told[3]["outputs"], told[1]["outputs"]);

    // A check is no run.
    succeed(&["check", &job]);
    assert_eq!(events(&scratch, "lineage.jsonl").len(), 4);
}

#[test]
fn failed_and_stopped_runs_end_their_lineage_and_a_parent_is_named() {
    let scratch = Scratch::new();
    let input = scratch.texts("in.parquet", (0..20_000).map(|_| Some("some words of a text")));
    let (model, output, lineage) = (checkpoint("cls-window-sharded"), scratch.arg("out"), scratch.arg("lineage.jsonl"));
    let args = ["classify", "-i", &input, "--model", &model, "-o", &output, "--openlineage", &lineage, "-q"];
    let parent = "airflow://host/labels.classify/01941f29-7c00-7087-8906-40e512c257bd";
    let failing = [&args[..], &["--max-length", "4", "--overflow", "error", "--on-error", "fail"]].concat();
    let failed =
        program(&failing).env("OPENLINEAGE_NAMESPACE", "night").env("OPENLINEAGE_PARENT_ID", parent).output().unwrap();
    assert_eq!(failed.status.code(), Some(65));

    let args = [&args[..], &["--unit-rows", "100", "--overwrite"]].concat();
    let child = program(&args).stderr(Stdio::null()).spawn().unwrap();
    while !scratch.path("out/part-000001.parquet").exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(143));

    let told = events(&scratch, "lineage.jsonl");
    assert_eq!(types(&told), ["START", "FAIL", "START", "ABORT"]);
    let facets = &told[1]["run"]["facets"];
    assert!(facets["errorMessage"]["message"].as_str().unwrap().contains("over the limit"), "{facets}");
    assert_eq!(facets["parent"]["job"], json!({ "namespace": "airflow://host", "name": "labels.classify" }));
    assert_eq!((&told[0]["job"]["namespace"], &told[0]["job"]["name"]), (&"night".into(), &"classify.out".into()));
    assert_eq!(told[3]["run"]["facets"]["mistralBatch_report"]["exit_code"], 143);

    // What cannot be told is known before anything is computed.
    let nowhere = scratch.arg("nowhere/lineage.jsonl");
    let args = ["classify", "-i", &input, "--model", &model, "-o", &scratch.arg("other"), "--openlineage", &nowhere];
    assert!(fail(74, &args).contains("nowhere/lineage.jsonl"));
    assert!(!scratch.path("other").exists());
}

/// A series by its name and labels, with its value.
type Series = BTreeMap<(String, BTreeMap<String, String>), f64>;

/// The samples of a file in Prometheus' text format, which must be right in every line.
fn samples(scratch: &Scratch, name: &str) -> Series {
    let text = std::fs::read_to_string(scratch.path(name)).unwrap();
    assert!(text.ends_with('\n'));
    let (mut series, mut families, mut help) = (Series::new(), BTreeMap::new(), BTreeSet::new());
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, text) = rest.split_once(' ').unwrap();
            assert!(help.insert(name.to_owned()) && !text.is_empty(), "{line}");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(help.contains(name) && families.insert(name.to_owned(), kind.to_owned()).is_none(), "{line}");
            assert!(["gauge", "counter"].contains(&kind), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
        } else {
            let (name_and_labels, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = name_and_labels.split_once('{').unwrap_or((name_and_labels, "}"));
            let mut labels = labels.strip_suffix('}').unwrap();
            let mut told = BTreeMap::new();
            while let Some((label, rest)) = labels.split_once("=\"") {
                let end = rest.match_indices('"').find(|(at, _)| !rest[..*at].ends_with('\\')).unwrap().0;
                assert!(told.insert(label.to_owned(), rest[..end].to_owned()).is_none(), "{line}");
                labels = rest[end + 1..].trim_start_matches(',');
            }
            assert!(labels.is_empty() && !told.contains_key("job") && !told.contains_key("instance"), "{line}");
            assert!(name.starts_with("mistral_batch_") && families.contains_key(name), "{line}");
            assert!(series.insert((name.to_owned(), told), value.parse().unwrap()).is_none(), "{line} is there twice");
        }
    }
    series
}

/// The value of a metric with one series.
#[track_caller]
fn value(series: &Series, name: &str) -> f64 {
    let name = format!("mistral_batch_{name}");
    let found: Vec<f64> = series.iter().filter(|((of, _), _)| *of == name).map(|(_, value)| *value).collect();
    assert_eq!(found.len(), 1, "{name}: {found:?}");
    found[0]
}

#[test]
fn metrics_tell_of_a_run_under_way_of_its_end_and_of_the_last_success() {
    let scratch = Scratch::new();
    let input = scratch.texts("in.parquet", (0..20_000).map(|_| Some("some words of a text")));
    let text = |more: &str| {
        format!(
            "command = 'classify'\nmodel = '{}'\ninput = ['{input}']\noutput = 'out'\nunit_rows = 100\n\
             prometheus = 'metrics.prom'\nquiet = true\n{more}\n",
            checkpoint("cls-window-sharded")
        )
    };
    let job = scratch.write("label.toml", text(""));
    let child = program(&["run", &job]).spawn().unwrap();
    while !scratch.path("out/part-000001.parquet").exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let running = samples(&scratch, "metrics.prom");
    assert_eq!(value(&running, "run_in_progress"), 1.0);
    assert!(!running.keys().any(|(name, _)| name.contains("last_success")), "there was none yet");
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(143));
    let stopped = samples(&scratch, "metrics.prom");
    let ended = |series: &Series| {
        ["run_in_progress", "run_success", "run_exit_code", "run_retryable"].map(|name| value(series, name))
    };
    assert_eq!(ended(&stopped), [0.0, 0.0, 143.0, 1.0]);

    succeed(&["run", &job, "--audit", "5"]);
    let done = samples(&scratch, "metrics.prom");
    assert_eq!(ended(&done), [0.0, 1.0, 0.0, 0.0]);
    assert_eq!((value(&done, "run_rows_out"), value(&done, "run_audit_rows_flipped")), (20_000.0, 0.0));
    assert!(value(&done, "run_units_resumed") >= 2.0);
    let (began, end) = (value(&done, "run_start_timestamp_seconds"), value(&done, "run_end_timestamp_seconds"));
    assert!((value(&done, "run_duration_seconds") - (end - began)).abs() < 1e-3);
    assert_eq!(value(&done, "last_success_timestamp_seconds"), end);
    let (ratio, seconds) = (value(&done, "run_model_busy_ratio"), value(&done, "run_model_duration_seconds"));
    assert!(ratio > 0.0 && ratio <= 1.0 && seconds > 0.0 && seconds <= end - began, "{ratio} {seconds}");
    let expected = BTreeMap::from([("command".into(), "classify".into()), ("job_name".into(), "label".into())]);
    assert!(done.keys().all(|(_, labels)| *labels == expected), "{done:?}");

    // The alerts that come along look at metrics that are there.
    let alerts = std::fs::read_to_string(project("jobs/schedulers/prometheus-alerts.yml")).unwrap();
    let expressions = alerts.lines().filter_map(|line| line.trim().strip_prefix("expr: "));
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = expressions.flat_map(|expression| expression.split(move |c| !is_word(c)));
    let named: BTreeSet<&str> = words.filter(|word| word.starts_with("mistral_batch_")).collect();
    assert!(named.len() >= 6, "{named:?}");
    for name in named {
        assert!(running.keys().chain(done.keys()).any(|(known, _)| known == name), "no metric {name}");
    }

    // Refused before there is a job: the last success stays known, and nothing else of it.
    scratch.write("label.toml", text("max_lenght = 5"));
    fail(78, &["run", &job]);
    let refused = samples(&scratch, "metrics.prom");
    assert_eq!(ended(&refused), [0.0, 0.0, 78.0, 0.0]);
    assert_eq!(value(&refused, "last_success_timestamp_seconds"), end);
    assert!(!refused.keys().any(|(name, _)| name.contains("rows_out")));
    let before = std::fs::read(scratch.path("metrics.prom")).unwrap();
    fail(78, &["check", &job]);
    fail_with_hints(64, &["check", &job, "--frobnicate"]);
    assert_eq!(std::fs::read(scratch.path("metrics.prom")).unwrap(), before, "a check is no run");

    let metrics = scratch.arg("metrics.prom");
    fail_with_hints(64, &["classify", "--frobnicate", "--prometheus", &metrics]);
    assert_eq!(value(&samples(&scratch, "metrics.prom"), "run_exit_code"), 64.0);
    let left: Vec<_> = std::fs::read_dir(scratch.path("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains(".tmp-")), "{left:?}");
}

/// A command line that the parser refuses, in more than one line.
#[track_caller]
fn fail_with_hints(code: i32, args: &[&str]) {
    assert_eq!(run(args).status.code(), Some(code), "{args:?}");
}

#[test]
fn a_sweep_tells_its_lineage_its_values_and_its_audits() {
    let scratch = Scratch::new();
    let (model, input) = tickets();
    let sweep = scratch.write(
        "tickets.toml",
        format!(
            "output = 'out'\nresamples = 20\n[settings]\nmodel = '{model}'\nlimit = 60\n[matrix]\nthreshold = [0.0, 0.9]\n\
             [[task]]\nname = 'topics'\nkind = 'classification'\ninput = ['{input}']\ntruth_column = 'topic'\n"
        ),
    );
    let (lineage, metrics, report) =
        (scratch.arg("lineage.jsonl"), scratch.arg("eval.prom"), scratch.arg("report.json"));
    let args =
        ["eval", &sweep, "--openlineage", &lineage, "--prometheus", &metrics, "--report", &report, "--audit", "7"];
    let said = succeed(&args);
    assert!(said.contains("audit: 7 rows computed once more, alone: "), "{said}");
    let told = events(&scratch, "lineage.jsonl");
    assert_eq!(types(&told), ["START", "COMPLETE"]);
    let names: Vec<&Value> = told[1]["inputs"].as_array().unwrap().iter().map(|dataset| &dataset["name"]).collect();
    assert_eq!(names, [&json!(input), &json!(model)]);
    let series = samples(&scratch, "eval.prom");
    assert_eq!((value(&series, "run_success"), value(&series, "eval_predictions")), (1.0, 1.0));
    let report: Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    let results = report["summary"]["results"].as_array().unwrap();
    assert_eq!(results.len(), 2);
    for result in results {
        let labels = |key: &str| result[key].as_str().unwrap().to_owned();
        let cell = result["cell"].to_string();
        let found =
            series.iter().find(|((name, of), _)| name == "mistral_batch_eval_value" && of["cell"] == cell).unwrap();
        assert_eq!((&found.0.1["task"], &found.0.1["measure"]), (&labels("task"), &labels("measure")));
        // Two parsers of decimals need not agree in the last bit.
        assert!((result["value"].as_f64().unwrap() - found.1).abs() < 1e-12, "{result} and {}", found.1);
    }
    let audits = report["summary"]["audits"].as_object().unwrap();
    assert!(audits.values().all(|audit| audit["rows"] == 7 && audit["rows_flipped"] == 0), "{audits:?}");
    assert!(succeed(&args).contains("audits none of their rows"), "a rerun has nothing to audit and says so");

    let text = std::fs::read_to_string(&sweep).unwrap();
    std::fs::write(&sweep, text.replace("limit = 60", "limit = 60\nreport = 'x'")).unwrap();
    assert!(fail(78, &["eval", &sweep]).contains("'report' is of the whole sweep"), "it would be ignored");
}
