//! Runs a job, however it was asked for, and shows how it goes.

use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};

use super::log;
use super::outlets::{self, Outlets, write_report};
use super::progress::Display;
use crate::data::digest::output_sha256;
use crate::data::output::OutputTarget;
use crate::data::sink::OnExisting;
use crate::error::{Error, Result, SIGINT, SIGTERM};
use crate::job::lineage::{LineageEnvironment, LineageRun};
use crate::job::prometheus::{MetricLabels, RunEnd};
use crate::job::{self, CheckReport, Job, JobFileIdentity, JobSpec, MessageSettings, RunControl, RunReport};

/// Runs `job`, showing its progress and handling signals.
pub fn run(job: Job) -> Result<()> {
    let labels = MetricLabels { job_name: job.name(), command: job.spec.command.name().to_owned() };
    let Job { spec, threads, dry_run, messages, file } = job;
    log::start(&messages);
    if dry_run {
        let checked = use_threads(threads).and_then(|()| job::check(&spec));
        return tell_check(&spec, file, checked, &messages);
    }
    let lineage = || LineageRun::of_job(&labels.job_name, &spec, LineageEnvironment::of_process());
    let outlets = Arc::new(Outlets::new(&messages, labels.clone(), lineage));
    let control = Arc::new(RunControl::default());
    let begun =
        outlets.begin().and_then(|()| use_threads(threads)).and_then(|()| Display::start(&messages, control.clone()));
    let (display, result) = match begun {
        Ok(display) => {
            let watch = outlets.watch(control.clone());
            let result = block_on(control.clone(), job::run(spec.clone(), control.clone()));
            drop(watch);
            (Some(display), result)
        }
        Err(error) => (None, Err(error)),
    };
    // A plain command refuses what it left itself until --resume says otherwise.
    let needs_resume = spec.on_existing == OnExisting::Refuse;
    let result = result.map_err(|error| if needs_resume { error } else { error.resumed_by_a_rerun() });
    let result = result.and_then(|mut report| {
        if let (Some(_), Some(hashes)) = (&messages.report, &mut report.hashes) {
            hashes.output = Some(output_sha256(&OutputTarget::locate(&spec.output, &spec.stores)?)?);
        }
        Ok(report)
    });
    let report = match &result {
        Ok(report) => report.clone(),
        Err(error) if display.is_some() => RunReport::failed(&spec, error).with_progress(&control.counters),
        Err(error) => RunReport::failed(&spec, error),
    };
    let report = RunReport { job_file: file, ..report };
    if let Some(display) = display {
        display.finish(&report);
    }
    let told = outlets.end_job(&report, &spec);
    result.map(|_| ()).and(told)
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
fn tell_check(
    spec: &JobSpec,
    file: Option<JobFileIdentity>,
    checked: Result<CheckReport>,
    messages: &MessageSettings,
) -> Result<()> {
    let report = match checked {
        Ok(report) => report,
        Err(error) => {
            let report = RunReport { job_file: file, ..RunReport::failed(spec, &error) };
            if let Some(path) = &messages.report
                && let Err(error) = write_report(path, &report)
            {
                tracing::warn!("{error}");
            }
            return Err(error);
        }
    };
    if let Some(path) = &messages.report {
        write_report(path, &report)?;
    }
    if messages.quiet {
        return Ok(());
    }
    super::print(&(report.lines().join("\n") + "\n"))
}

/// Tells of a command that was refused before there was a job; `job_name` is empty where it is not known.
pub(super) fn refused(messages: &MessageSettings, job_name: &str, error: Error) -> Error {
    log::start(messages);
    let report = RunReport::refused(&error);
    let labels = MetricLabels { job_name: job_name.to_owned(), ..MetricLabels::default() };
    let end = RunEnd { exit_code: report.exit_code, retryable: report.retryable };
    outlets::refused(messages, &labels, end, &report);
    error
}

pub(super) fn use_threads(threads: Option<u64>) -> Result<()> {
    let Some(threads) = threads else { return Ok(()) };
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads as usize)
        .build_global()
        .map_err(|error| Error::Usage(format!("--threads {threads}: {error}")))
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
