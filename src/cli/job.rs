//! Runs a job, however it was asked for, and shows how it goes.

use std::path::Path;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};

use super::progress::Display;
use crate::error::{Error, Result, SIGINT, SIGTERM};
use crate::job::{self, Job, JobSpec, MessageSettings, RunControl, RunReport};

/// Runs `job`, showing its progress and handling signals.
pub fn run(job: Job) -> Result<()> {
    let Job { spec, device, threads, dry_run, messages } = job;
    check_device(&device)?;
    use_threads(threads)?;
    if dry_run {
        return check(&spec, &messages);
    }
    let control = Arc::new(RunControl::default());
    let display = Display::start(&messages, control.clone());

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1) // the pipeline's stages are blocking threads; this one only waits for them and for signals
        .enable_all()
        .build()
        .map_err(|error| Error::Internal(format!("cannot start the runtime: {error}")))?;
    let result = runtime.block_on(async {
        tokio::spawn(stop_on_signals(control.clone()));
        job::run(spec.clone(), control).await
    });
    let report = match &result {
        Ok(report) => report.clone(),
        Err(error) => RunReport::failed(&spec, error),
    };
    display.finish(&report);
    if let Some(path) = &messages.report {
        write_report(path, &report)?;
    }
    result.map(|_| ())
}

/// Tells what the job would do, on standard output; `--report` has it as JSON, or why it was refused.
fn check(spec: &JobSpec, messages: &MessageSettings) -> Result<()> {
    let checked = job::check(spec);
    if let Some(path) = &messages.report {
        match &checked {
            Ok(report) => write_report(path, report)?,
            Err(error) => write_report(path, &RunReport::failed(spec, error))?,
        }
    }
    let report = checked?;
    if messages.quiet {
        return Ok(());
    }
    super::print(&(report.lines().join("\n") + "\n"))
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
pub(super) async fn stop_on_signals(control: Arc<RunControl>) {
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

fn write_report(path: &Path, report: &impl serde::Serialize) -> Result<()> {
    let json = serde_json::to_string_pretty(report).map_err(|error| Error::Internal(error.to_string()))?;
    std::fs::write(path, json + "\n").map_err(Error::io("write", path))
}
