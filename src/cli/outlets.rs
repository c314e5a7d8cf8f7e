//! Where a command tells other programs how it goes, beside standard error: `--report`, `--openlineage`, `--prometheus`.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;

use crate::data::commit::{TempFile, parent_of};
use crate::data::digest::output_files;
use crate::data::output::OutputTarget;
use crate::error::{Error, Result};
use crate::job::lineage::{LineageRun, OutputSize};
use crate::job::prometheus::{MetricLabels, MetricsText, RunEnd, RunTimes};
use crate::job::{Counters, JobSpec, MessageSettings, RunControl, RunReport};

/// How often the metrics of a run under way are written; scrapers come every 15 s or so.
const METRICS_INTERVAL: Duration = Duration::from_secs(10);

/// What is told of one run, and where.
pub struct Outlets {
    messages: MessageSettings,
    labels: MetricLabels,
    started: DateTime<Utc>,
    lineage: Option<LineageRun>,
    /// Whether the beginning was told: what could not be, is not told of the end either.
    has_metrics: AtomicBool,
    has_lineage: AtomicBool,
}

/// Writes the metrics of a run under way until it is dropped.
pub struct MetricsWatch {
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Outlets {
    /// The outlets of a run that begins now; `lineage` is asked for only where events are wanted.
    pub fn new(messages: &MessageSettings, labels: MetricLabels, lineage: impl FnOnce() -> LineageRun) -> Self {
        let lineage = messages.openlineage.is_some().then(lineage);
        Self {
            messages: messages.clone(),
            labels,
            started: Utc::now(),
            lineage,
            has_metrics: AtomicBool::new(false),
            has_lineage: AtomicBool::new(false),
        }
    }

    /// Tells that the run begins; what cannot be told is known before anything is computed.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be written.
    pub fn begin(&self) -> Result<()> {
        if let Some(path) = &self.messages.prometheus {
            self.write_progress(path, &Counters::default())?;
            self.has_metrics.store(true, Ordering::Relaxed);
        }
        if let (Some(path), Some(lineage)) = (&self.messages.openlineage, &self.lineage) {
            append_line(path, &lineage.start(self.started))?;
            self.has_lineage.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Keeps the metrics of the run under `control` up to date.
    pub fn watch(self: &Arc<Self>, control: Arc<RunControl>) -> Option<MetricsWatch> {
        let path = self.messages.prometheus.clone()?;
        let done = Arc::new(AtomicBool::new(false));
        let (outlets, is_done) = (self.clone(), done.clone());
        let thread = std::thread::spawn(move || {
            loop {
                std::thread::park_timeout(METRICS_INTERVAL);
                if is_done.load(Ordering::Relaxed) {
                    return;
                }
                if let Err(error) = outlets.write_progress(&path, &control.counters) {
                    tracing::warn!("{error}");
                }
            }
        });
        Some(MetricsWatch { done, thread: Some(thread) })
    }

    /// Tells how a job ended.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be written; of a run that failed that is only warned of.
    pub fn end_job(&self, report: &RunReport, spec: &JobSpec) -> Result<()> {
        let end = RunEnd { exit_code: report.exit_code, retryable: report.retryable };
        let event = |lineage: &LineageRun| -> Result<Value> {
            let is_whole = report.exit_code == 0;
            let size = is_whole.then(|| output_size(spec)).transpose()?;
            Ok(lineage.end(Utc::now(), report, size))
        };
        self.end(end, report, event, |text| text.job(report))
    }

    /// Tells how a command ended that is no single job; `metrics` adds what is measured of it alone.
    ///
    /// # Errors
    /// As [`Outlets::end_job`].
    pub fn end_with(&self, end: RunEnd, report: &impl Serialize, metrics: impl FnOnce(&mut MetricsText)) -> Result<()> {
        let told = serde_json::to_value(report).map_err(|error| Error::Internal(error.to_string()))?;
        self.end(end, report, |lineage| Ok(lineage.end_with(Utc::now(), &told)), metrics)
    }

    fn end(
        &self,
        end: RunEnd,
        report: &impl Serialize,
        event: impl FnOnce(&LineageRun) -> Result<Value>,
        metrics: impl FnOnce(&mut MetricsText),
    ) -> Result<()> {
        let has_failed = end.exit_code != 0;
        let told = |result: Result<()>| match result {
            // That it cannot be told is not the failure to tell of.
            Err(error) if has_failed => {
                tracing::warn!("{error}");
                Ok(())
            }
            result => result,
        };
        if let Some(path) = &self.messages.report {
            told(write_report(path, report))?;
        }
        if let Some(path) = self.messages.prometheus.as_ref().filter(|_| self.has_metrics.load(Ordering::Relaxed)) {
            told(write_end_metrics(path, &self.labels, end, self.started, metrics))?;
        }
        if let (Some(path), Some(lineage), true) =
            (&self.messages.openlineage, &self.lineage, self.has_lineage.load(Ordering::Relaxed))
        {
            told(event(lineage).and_then(|event| append_line(path, &event)))?;
        }
        Ok(())
    }

    fn write_progress(&self, path: &Path, counters: &Counters) -> Result<()> {
        let mut text = MetricsText::new(&self.labels);
        text.progress(seconds(self.started), counters, &content(path));
        write_whole(path, &text.into_text())
    }
}

impl Drop for MetricsWatch {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // What it would have written is written once more at the end.
            let _ = thread.join();
        }
    }
}

/// Tells of a command that was refused before it began: in the report and in the metrics.
pub fn refused(messages: &MessageSettings, labels: &MetricLabels, end: RunEnd, report: &impl Serialize) {
    let reported = messages.report.as_ref().map_or(Ok(()), |path| write_report(path, report));
    let measured = match &messages.prometheus {
        Some(path) => write_end_metrics(path, labels, end, Utc::now(), |_| ()),
        None => Ok(()),
    };
    // That it cannot be told is not the failure to tell of.
    for error in [reported, measured].into_iter().filter_map(Result::err) {
        tracing::warn!("{error}");
    }
}

fn write_end_metrics(
    path: &Path,
    labels: &MetricLabels,
    end: RunEnd,
    started: DateTime<Utc>,
    more: impl FnOnce(&mut MetricsText),
) -> Result<()> {
    let mut text = MetricsText::new(labels);
    let times = RunTimes { started: seconds(started), ended: seconds(Utc::now()) };
    text.end(end, times, &content(path));
    more(&mut text);
    write_whole(path, &text.into_text())
}

/// What a file of metrics holds; nothing where there is none yet.
fn content(path: &Path) -> String {
    // A device or a pipe has no earlier metrics, and reading one may never end.
    if path.is_file() { std::fs::read_to_string(path).unwrap_or_default() } else { String::new() }
}

fn seconds(time: DateTime<Utc>) -> f64 {
    time.timestamp_millis() as f64 / 1000.0
}

fn output_size(spec: &JobSpec) -> Result<OutputSize> {
    let files = output_files(&OutputTarget::locate(&spec.output, &spec.stores)?)?;
    // One that was removed since is not told of.
    let files: Vec<_> = files.iter().filter_map(|place| place.file().transpose()).collect::<Result<_>>()?;
    Ok(OutputSize { files: files.len() as u64, bytes: files.iter().map(|file| file.size_bytes()).sum() })
}

/// Appends one JSON object as a line, in one write, so that runs can share the file.
fn append_line(path: &Path, event: &Value) -> Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(path).map_err(Error::io("write", path))?;
    file.write_all(format!("{event}\n").as_bytes()).map_err(Error::io("write", path))
}

/// Replaces a report as a whole.
pub fn write_report(path: &Path, report: &impl Serialize) -> Result<()> {
    let json = serde_json::to_string_pretty(report).map_err(|error| Error::Internal(error.to_string()))? + "\n";
    write_whole(path, &json)
}

/// Replaces a file as a whole, so that no reader finds half of one.
///
/// What cannot be replaced is written to where it stands: /dev/stdout, or a file that a container has mounted.
fn write_whole(path: &Path, text: &str) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let replace = || {
        let mut temp = TempFile::create(parent_of(path), &name)?;
        temp.write_all(text.as_bytes()).map_err(Error::io("write", path))?;
        temp.replace(path)
    };
    if (path.exists() && !path.is_file()) || replace().is_err() {
        return std::fs::write(path, text).map_err(Error::io("write", path));
    }
    Ok(())
}
