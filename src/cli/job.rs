//! Runs a job, however it was asked for, and shows how it goes.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::log;
use super::progress::Display;
use crate::data::commit::{TempFile, parent_of};
use crate::data::digest::output_sha256;
use crate::data::output::OutputTarget;
use crate::error::{Error, Result, SIGINT, SIGTERM};
use crate::job::{self, Job, JobSpec, MessageSettings, RunControl, RunReport};

/// Runs `job`, showing its progress and handling signals.
pub fn run(job: Job) -> Result<()> {
    let Job { spec, device, threads, dry_run, messages, file } = job;
    log::start(&messages);
    let reported = |error: Error| {
        let report = RunReport { job_file: file.clone(), ..RunReport::failed(&spec, &error) };
        report_failure(&messages, &report);
        error
    };
    check_device(&device).and_then(|()| use_threads(threads)).map_err(reported)?;
    if dry_run {
        return check(&spec, &messages);
    }
    let control = Arc::new(RunControl::default());
    let display = Display::start(&messages, control.clone()).map_err(reported)?;
    let result = block_on(control.clone(), job::run(spec.clone(), control.clone()));
    let mut report = match &result {
        Ok(report) => report.clone(),
        Err(error) => RunReport::failed(&spec, error).with_progress(&control.counters),
    };
    report.job_file = file;
    display.finish(&report);
    let Some(path) = &messages.report else { return result.map(|_| ()) };
    if result.is_err() {
        report_failure(&messages, &report);
        return result.map(|_| ());
    }
    if let Some(hashes) = &mut report.hashes {
        hashes.output = Some(output_sha256(&OutputTarget::locate(&spec.output, &spec.stores)?)?);
    }
    write_report(path, &report)
}

/// Does the work of a command on a runtime of its own; SIGINT and SIGTERM stop what `control` controls.
pub(super) fn block_on<T>(control: Arc<RunControl>, work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1) // the pipeline's stages are blocking threads; this one only waits for them and for signals
        .enable_all()
        .build()
        .map_err(|error| Error::Internal(format!("cannot start the runtime: {error}")))?;
    runtime.block_on(async {
        tokio::spawn(stop_on_signals(control));
        work.await
    })
}

/// Tells what the job would do, on standard output; `--report` has it as JSON, or why it was refused.
fn check(spec: &JobSpec, messages: &MessageSettings) -> Result<()> {
    let report = job::check(spec).inspect_err(|error| report_failure(messages, &RunReport::failed(spec, error)))?;
    if let Some(path) = &messages.report {
        write_report(path, &report)?;
    }
    if messages.quiet {
        return Ok(());
    }
    super::print(&(report.lines().join("\n") + "\n"))
}

/// Writes the report of a command that failed before there was a job.
pub(super) fn refused(messages: &MessageSettings, error: Error) -> Error {
    log::start(messages);
    report_failure(messages, &RunReport::refused(&error));
    error
}

/// Writes the report of a failure, if one was asked for; that it cannot be written is not the failure to tell of.
pub(super) fn report_failure(messages: &MessageSettings, report: &impl Serialize) {
    if let Some(path) = &messages.report
        && let Err(error) = write_report(path, report)
    {
        tracing::warn!("{error}");
    }
}

pub(super) fn use_threads(threads: Option<u64>) -> Result<()> {
    let Some(threads) = threads else { return Ok(()) };
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads as usize)
        .build_global()
        .map_err(|error| Error::Usage(format!("--threads {threads}: {error}")))
}

pub(super) fn check_device(device: &str) -> Result<()> {
    match device {
        "auto" | "cpu" => Ok(()),
        cuda if cuda.starts_with("cuda") => Err(Error::Device {
            device: cuda.to_owned(),
            message: "this build computes on the CPU only; use --device cpu".into(),
        }),
        other => Err(Error::Usage(format!("--device {other}: expected auto or cpu"))),
    }
}

/// The first SIGINT or SIGTERM lets the run stop cleanly; a second one ends the process at once.
async fn stop_on_signals(control: Arc<RunControl>) {
    let (Ok(mut interrupts), Ok(mut terminations)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return;
    };
    let mut stopping = false;
    loop {
        let received = tokio::select! {
            _ = interrupts.recv() => SIGINT,
            _ = terminations.recv() => SIGTERM,
        };
        if stopping {
            std::process::exit(128 + received);
        }
        stopping = true;
        control.stop(received);
    }
}

/// Replaces a report as a whole, so that no reader finds half of one.
///
/// What cannot be replaced is written to where it stands: /dev/stdout, or a file that a container has mounted.
pub(super) fn write_report(path: &Path, report: &impl Serialize) -> Result<()> {
    let json = serde_json::to_string_pretty(report).map_err(|error| Error::Internal(error.to_string()))? + "\n";
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let replace = || {
        let mut temp = TempFile::create(parent_of(path), &name)?;
        temp.write_all(json.as_bytes()).map_err(Error::io("write", path))?;
        temp.replace(path)
    };
    if (path.exists() && !path.is_file()) || replace().is_err() {
        return std::fs::write(path, &json).map_err(Error::io("write", path));
    }
    Ok(())
}
