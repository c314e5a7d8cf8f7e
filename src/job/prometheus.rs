//! Metrics of a run in [Prometheus' text format](https://prometheus.io/docs/instrumenting/exposition_formats/), for
//! node_exporter's textfile collector.
//!
//! A run is over before anybody scrapes it, so that all but the progress of one under way are gauges of the last run. The
//! label `job` belongs to the scraper; a job's name is in `job_name`.

use std::fmt::Write;

use serde_json::Value;

use super::control::Counters;
use super::report::RunReport;

/// The metric that outlives the runs after it that fail.
const LAST_SUCCESS: &str = "mistral_batch_last_success_timestamp_seconds";
const LAST_SUCCESS_HELP: &str = "When a run last did what it was asked.";

/// What a file of metrics is about.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MetricLabels {
    /// The job file's name without its ending, or what stands for it; empty where it is not known.
    pub job_name: String,
    /// As `classify`; empty where it is not known.
    pub command: String,
}

/// When a run was, in seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RunTimes {
    pub started: f64,
    pub ended: f64,
}

/// How a run ended, for what is no single job too.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RunEnd {
    pub exit_code: u8,
    pub retryable: bool,
}

/// A file of metrics under way.
pub struct MetricsText {
    labels: Vec<(&'static str, String)>,
    text: String,
}

impl MetricsText {
    /// An empty file whose samples all have `labels`.
    pub fn new(labels: &MetricLabels) -> Self {
        let labels = [("command", &labels.command), ("job_name", &labels.job_name)];
        let known = labels.into_iter().filter(|(_, value)| !value.is_empty());
        Self { labels: known.map(|(name, value)| (name, value.clone())).collect(), text: String::new() }
    }

    /// The metrics so far.
    pub fn into_text(self) -> String {
        self.text
    }

    /// Begins a metric: its help, its unit in its name.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // A String takes everything.
        let _ = write!(
            self.text,
            "# HELP {name} {}\n# TYPE {name} {kind}\n",
            help.replace('\\', "\\\\").replace('\n', "\\n")
        );
    }

    fn sample(&mut self, name: &str, more: &[(&str, &str)], value: f64) {
        let own = self.labels.iter().map(|(label, value)| (*label, value.as_str()));
        let labels: Vec<String> =
            own.chain(more.iter().copied()).map(|(label, value)| format!("{label}=\"{}\"", escape(value))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.text, "{name}{labels} {}", number(value));
    }

    /// A metric with one sample.
    pub fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.family(name, "gauge", help);
        self.sample(name, &[], value);
    }

    /// A metric with a sample for each set of labels; nothing where there is none.
    pub fn gauges(&mut self, name: &str, help: &str, samples: &[(Vec<(&str, &str)>, f64)]) {
        if samples.is_empty() {
            return;
        }
        self.family(name, "gauge", help);
        for (labels, value) in samples {
            self.sample(name, labels, *value);
        }
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, "counter", help);
        self.sample(name, &[], value as f64);
    }

    /// How the run ended. `before` is what the file held until now: a success in it stays known.
    pub fn end(&mut self, end: RunEnd, times: RunTimes, before: &str) {
        let succeeded = end.exit_code == 0;
        self.gauge("mistral_batch_run_in_progress", "Whether a run is under way.", 0.0);
        self.gauge("mistral_batch_run_success", "Whether the last run did what it was asked.", flag(succeeded));
        let help = "Exit code of the last run, as sysexits.h has them.";
        self.gauge("mistral_batch_run_exit_code", help, f64::from(end.exit_code));
        let help = "Whether the same run again may go through without anybody doing anything.";
        self.gauge("mistral_batch_run_retryable", help, flag(end.retryable));
        self.gauge("mistral_batch_run_start_timestamp_seconds", "When the last run began.", times.started);
        self.gauge("mistral_batch_run_end_timestamp_seconds", "When the last run ended.", times.ended);
        let help = "How long the last run took, from its start to its commit.";
        let milliseconds = (1e3 * (times.ended - times.started)).round();
        self.gauge("mistral_batch_run_duration_seconds", help, milliseconds / 1e3);
        if succeeded {
            self.gauge(LAST_SUCCESS, LAST_SUCCESS_HELP, times.ended);
        } else {
            self.keep_last_success(before);
        }
    }

    /// Says again what an earlier run wrote of the last success.
    fn keep_last_success(&mut self, before: &str) {
        if let Some(line) = last_success(before) {
            self.family(LAST_SUCCESS, "gauge", LAST_SUCCESS_HELP);
            let _ = writeln!(self.text, "{line}");
        }
    }

    /// What a job's run did; `finished_earlier` counts where this one had nothing to do.
    pub fn job(&mut self, report: &RunReport) {
        let details = match (&report.details, &report.finished_earlier) {
            (Some(details), _) => serde_json::to_value(details).unwrap_or_default(),
            (None, Some(earlier)) => earlier.clone(),
            (None, None) => return,
        };
        let number = |path: &str| details.pointer(path).and_then(Value::as_f64);
        let gauges = [
            ("rows_in", "/rows_in", "Rows of the input that passed the filter and the limit.", 1.0),
            ("rows_out", "/rows_out", "Rows of the output.", 1.0),
            ("rows_null", "/rows_null", "Rows without a text.", 1.0),
            ("rows_failed", "/rows_failed", "Rows that failed and have their error in the output.", 1.0),
            ("rows_truncated", "/rows_truncated", "Rows whose text was cut to the limit of tokens.", 1.0),
            ("units", "/units", "Units of the output.", 1.0),
            ("units_resumed", "/units_resumed", "Units that an earlier run had committed.", 1.0),
            ("tokens", "/tokens", "Tokens that the model read or wrote.", 1.0),
            ("padding_ratio", "/padding_percent", "Share of padding in the batches, which is not computed.", 0.01),
            ("tokens_per_second", "/tokens_per_second", "Tokens of the run per second of its pipeline.", 1.0),
            (
                "model_busy_ratio",
                "/model_busy_percent",
                "Share of the pipeline's time in which the model computed.",
                0.01,
            ),
            ("plan_duration_seconds", "/timings/plan_seconds", "Time to look at inputs and checkpoint.", 1.0),
            ("load_duration_seconds", "/timings/load_seconds", "Time to read the weights.", 1.0),
            (
                "pipeline_duration_seconds",
                "/timings/pipeline_seconds",
                "From the first row read to the last part written.",
                1.0,
            ),
            ("model_duration_seconds", "/timings/model_seconds", "Time in model and head, within the pipeline.", 1.0),
            ("audit_rows", "/audit/rows", "Rows that were computed once more, alone.", 1.0),
            ("audit_rows_flipped", "/audit/rows_flipped", "Audited rows with another result.", 1.0),
            (
                "audit_largest_difference",
                "/audit/largest_difference",
                "Largest difference of a number of an audited row.",
                1.0,
            ),
        ];
        for (name, path, help, scale) in gauges {
            if let Some(value) = number(path) {
                self.gauge(&format!("mistral_batch_run_{name}"), help, scale * value);
            }
        }
        let truth = details["truth"].as_object().into_iter().flatten();
        let samples: Vec<_> =
            truth.filter_map(|(measure, value)| Some((vec![("measure", measure.as_str())], value.as_f64()?))).collect();
        self.gauges("mistral_batch_run_truth", "How well results agree with the truth column, by measure.", &samples);
    }

    /// How far a run under way is.
    pub fn progress(&mut self, started: f64, counters: &Counters, before: &str) {
        let get = Counters::get;
        self.gauge("mistral_batch_run_in_progress", "Whether a run is under way.", 1.0);
        self.gauge("mistral_batch_run_start_timestamp_seconds", "When the run under way began.", started);
        let planned = get(&counters.rows_total).saturating_sub(get(&counters.rows_filtered));
        self.gauge("mistral_batch_progress_rows_planned", "Rows that this run is to compute.", planned as f64);
        let help = "Rows that this run has computed.";
        self.counter("mistral_batch_progress_rows_total", help, get(&counters.rows_done));
        let help = "Rows of this run that failed.";
        self.counter("mistral_batch_progress_rows_failed_total", help, get(&counters.rows_failed));
        self.counter("mistral_batch_progress_tokens_total", "Tokens of this run.", get(&counters.real_tokens));
        let help = "Units that this run has committed.";
        self.counter("mistral_batch_progress_units_total", help, get(&counters.parts));
        self.keep_last_success(before);
    }
}

/// The sample of the last success in a file that an earlier run wrote.
fn last_success(before: &str) -> Option<&str> {
    before.lines().find(|line| line.starts_with(LAST_SUCCESS))
}

fn flag(is_so: bool) -> f64 {
    f64::from(u8::from(is_so))
}

/// As the format writes numbers.
fn number(value: f64) -> String {
    match value {
        value if value.is_nan() => "NaN".to_owned(),
        f64::INFINITY => "+Inf".to_owned(),
        f64::NEG_INFINITY => "-Inf".to_owned(),
        value => value.to_string(),
    }
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: RunEnd = RunEnd { exit_code: 65, retryable: false };
    const TIMES: RunTimes = RunTimes { started: 100.5, ended: 102.0 };

    fn labels(job_name: &str) -> MetricLabels {
        MetricLabels { job_name: job_name.into(), command: "classify".into() }
    }

    #[test]
    fn labels_and_help_are_escaped() {
        let mut text = MetricsText::new(&labels("a\"b\\c\nd"));
        text.gauge("x_ratio", "one\ntwo \\", f64::NAN);
        assert_eq!(
            text.into_text(),
            "# HELP x_ratio one\\ntwo \\\\\n# TYPE x_ratio gauge\nx_ratio{command=\"classify\",job_name=\"a\\\"b\\\\c\\nd\"} NaN\n"
        );
        let mut text = MetricsText::new(&MetricLabels::default());
        text.gauge("x_ratio", "h", 0.25);
        assert!(text.into_text().ends_with("\nx_ratio 0.25\n"));
    }

    #[test]
    fn a_success_is_known_after_failures() {
        let mut done = MetricsText::new(&labels("a"));
        done.end(RunEnd { exit_code: 0, ..END }, TIMES, "");
        let success = "mistral_batch_last_success_timestamp_seconds{command=\"classify\",job_name=\"a\"} 102";
        let mut before = done.into_text();
        assert!(before.contains(success));
        for _ in 0..2 {
            let mut running = MetricsText::new(&labels("a"));
            running.progress(110.0, &Counters::default(), &before);
            let mut failed = MetricsText::new(&labels("a"));
            failed.end(END, RunTimes { started: 110.0, ended: 111.0 }, &running.into_text());
            before = failed.into_text();
        }
        assert!(before.contains(success) && before.contains("run_success{command=\"classify\",job_name=\"a\"} 0"));
        let mut first = MetricsText::new(&labels("a"));
        first.end(END, TIMES, "");
        assert!(!first.into_text().contains(LAST_SUCCESS), "there was none yet");
    }
}
