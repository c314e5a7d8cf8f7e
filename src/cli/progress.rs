//! What a run shows on standard error while it works, and at its end.

use std::io::{IsTerminal, stderr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::log;
use crate::batch::Padding;
use crate::error::{Error, Result};
use crate::job::{Counters, LogFormat, MessageSettings, ProgressMode, RunControl, RunDetails, RunReport};

const BAR_INTERVAL: Duration = Duration::from_millis(200);
const JSON_INTERVAL: Duration = Duration::from_secs(1);
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);
/// How soon the display notices that the run has ended.
const POLL: Duration = Duration::from_millis(50);

/// The thread that shows a run's progress.
pub struct Display {
    mode: ProgressMode,
    bar: ProgressBar,
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// The counters at one moment.
struct Snapshot {
    rows: u64,
    total: u64,
    failed: u64,
    tokens: u64,
    tokens_per_second: f64,
    padding_percent: f64,
    eta: Option<Duration>,
}

impl Display {
    /// Begins to show the progress of the run behind `control`.
    ///
    /// # Errors
    /// [`Error::Usage`] for a bar among JSON lines.
    pub fn start(messages: &MessageSettings, control: Arc<RunControl>) -> Result<Self> {
        let quiet = messages.quiet;
        let is_json = messages.log_format == Some(LogFormat::Json);
        let mode = match messages.progress.unwrap_or(ProgressMode::Auto) {
            _ if quiet => ProgressMode::None,
            ProgressMode::Bar if is_json => {
                return Err(Error::Usage("--progress bar does not go with --log-format json; leave one out".into()));
            }
            ProgressMode::Auto if !is_json && stderr().is_terminal() => ProgressMode::Bar,
            ProgressMode::Auto => ProgressMode::Plain,
            mode => mode,
        };
        let bar = match mode {
            ProgressMode::Bar => ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()),
            _ => ProgressBar::hidden(),
        };
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} rows  {msg}") {
            bar.set_style(style);
        }
        let done = Arc::new(AtomicBool::new(false));
        let thread = {
            let (bar, done) = (bar.clone(), done.clone());
            std::thread::spawn(move || watch(mode, &bar, &control, &done))
        };
        if mode == ProgressMode::Bar {
            log::set_bar(Some(bar.clone()));
        }
        Ok(Self { mode, bar, done, thread: Some(thread) })
    }

    /// Ends the display.
    pub fn close(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A display that panicked has nothing more to show, and the run's result stands.
            let _ = thread.join();
        }
        self.bar.finish_and_clear();
        log::set_bar(None);
    }

    /// Ends the display with the run's summary; errors are told elsewhere.
    pub fn finish(mut self, report: &RunReport) {
        self.close();
        let (status, output) = (report.status, report.output.as_deref().unwrap_or(""));
        if self.mode == ProgressMode::Json {
            eprintln!("{}", json!({"event": "end", "report": report}));
        } else if let Some(details) = &report.details {
            for line in details.lines() {
                tracing::info!("{line}");
            }
            let RunDetails { rows_in, rows_out, rows_failed, tokens, .. } = *details;
            let seconds = details.timings.total_seconds;
            tracing::info!(status, rows_in, rows_out, rows_failed, tokens, seconds, "written to {output}");
            if let Some(audit) = details.audit.as_ref().filter(|audit| audit.rows_flipped > 0) {
                tracing::warn!("{}", audit.warning());
            }
        } else if status == "nothing_to_do" {
            tracing::info!(status, "{output} is finished already: nothing to do");
        }
    }
}

fn watch(mode: ProgressMode, bar: &ProgressBar, control: &RunControl, done: &AtomicBool) {
    let interval = match mode {
        ProgressMode::Bar => BAR_INTERVAL,
        ProgressMode::Json => JSON_INTERVAL,
        _ => PLAIN_INTERVAL,
    };
    let mut started: Option<Instant> = None;
    let mut last = Instant::now();
    loop {
        if done.load(Ordering::Relaxed) {
            return;
        }
        if Counters::get(&control.counters.rows_total) > 0 {
            // Rates count from here, so that loading a model does not look like slowness.
            let started = *started.get_or_insert_with(Instant::now);
            if last.elapsed() >= interval {
                last = Instant::now();
                show(mode, bar, &Snapshot::take(control, started.elapsed()));
            }
        }
        std::thread::sleep(POLL);
    }
}

impl Snapshot {
    fn take(control: &RunControl, elapsed: Duration) -> Self {
        let counters = &control.counters;
        let rows_done = Counters::get(&counters.rows_done);
        let resumed = Counters::get(&counters.rows_resumed);
        let total = Counters::get(&counters.rows_total).saturating_sub(Counters::get(&counters.rows_filtered));
        let real_tokens = Counters::get(&counters.real_tokens);
        let padding = Padding { real_tokens, padded_tokens: Counters::get(&counters.padded_tokens).max(real_tokens) };
        let left = total.saturating_sub(rows_done);
        Self {
            rows: resumed + rows_done,
            total: resumed + total,
            failed: Counters::get(&counters.rows_failed),
            tokens: real_tokens,
            tokens_per_second: real_tokens as f64 / elapsed.as_secs_f64().max(1e-3),
            padding_percent: padding.waste_percent(),
            eta: (rows_done > 0).then(|| elapsed.mul_f64(left as f64 / rows_done as f64)),
        }
    }

    fn message(&self) -> String {
        let eta = self.eta.map_or("unknown".to_owned(), |eta| HumanDuration(eta).to_string());
        let failed = if self.failed > 0 { format!(", {} failed", self.failed) } else { String::new() };
        format!("{:.0} tokens/s, {:.1}% padding, {eta} left{failed}", self.tokens_per_second, self.padding_percent)
    }
}

fn show(mode: ProgressMode, bar: &ProgressBar, now: &Snapshot) {
    match mode {
        ProgressMode::Bar => {
            bar.set_length(now.total);
            bar.set_position(now.rows);
            bar.set_message(now.message());
        }
        ProgressMode::Plain => tracing::info!(
            rows = now.rows,
            rows_total = now.total,
            rows_failed = now.failed,
            tokens = now.tokens,
            tokens_per_second = now.tokens_per_second,
            padding_percent = now.padding_percent,
            eta_seconds = now.eta.map(|eta| eta.as_secs_f64()),
            "{}/{} rows, {}",
            now.rows,
            now.total,
            now.message()
        ),
        ProgressMode::Json => eprintln!(
            "{}",
            json!({
                "event": "progress",
                "rows": now.rows,
                "rows_total": now.total,
                "rows_failed": now.failed,
                "tokens": now.tokens,
                "tokens_per_second": now.tokens_per_second,
                "padding_percent": now.padding_percent,
                "eta_seconds": now.eta.map(|eta| eta.as_secs_f64()),
            })
        ),
        ProgressMode::Auto | ProgressMode::None => {}
    }
}
