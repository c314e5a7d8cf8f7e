//! What queries compute, on standard error while they do.

use std::io::{IsTerminal, stderr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::ProgressMode;
use crate::sql::SqlProgress;

const BAR_INTERVAL: Duration = Duration::from_millis(200);
const JSON_INTERVAL: Duration = Duration::from_secs(1);
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);
/// How soon the display notices that a statement has ended.
const POLL: Duration = Duration::from_millis(50);

/// Shows how far models are with a statement; nothing where none is used.
pub struct QueryProgress {
    mode: ProgressMode,
    counters: Arc<SqlProgress>,
    bar: ProgressBar,
    running: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
}

impl QueryProgress {
    pub fn new(mode: ProgressMode, quiet: bool, counters: Arc<SqlProgress>) -> Self {
        let mode = match mode {
            _ if quiet => ProgressMode::None,
            ProgressMode::Auto if stderr().is_terminal() => ProgressMode::Bar,
            ProgressMode::Auto => ProgressMode::Plain,
            other => other,
        };
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(
            ProgressStyle::with_template("{spinner} {msg}").unwrap_or_else(|_| ProgressStyle::default_spinner()),
        );
        Self { mode, counters, bar, running: None }
    }

    /// A statement begins.
    pub fn start(&mut self) {
        if self.mode == ProgressMode::None {
            return;
        }
        let done = Arc::new(AtomicBool::new(false));
        let (mode, counters, bar, ended) = (self.mode, self.counters.clone(), self.bar.clone(), done.clone());
        let thread = std::thread::spawn(move || watch(mode, &counters, &bar, &ended));
        self.running = Some((done, thread));
    }

    /// The statement has ended.
    pub fn stop(&mut self) {
        if let Some((done, thread)) = self.running.take() {
            done.store(true, Ordering::Relaxed);
            // A display that panicked shows nothing any more; the statement went its way.
            let _ = thread.join();
        }
    }

    /// Prints without a bar in between.
    pub fn suspend<T>(&self, print: impl FnOnce() -> T) -> T {
        match self.mode {
            ProgressMode::Bar if !self.bar.message().is_empty() => self.bar.suspend(print),
            _ => print(),
        }
    }
}

fn watch(mode: ProgressMode, counters: &SqlProgress, bar: &ProgressBar, done: &AtomicBool) {
    let interval = match mode {
        ProgressMode::Bar => BAR_INTERVAL,
        ProgressMode::Json => JSON_INTERVAL,
        _ => PLAIN_INTERVAL,
    };
    let read = || (counters.rows.load(Ordering::Relaxed), counters.tokens.load(Ordering::Relaxed));
    let (started, before) = (Instant::now(), read());
    let mut shown = started;
    while !done.load(Ordering::Relaxed) {
        std::thread::sleep(POLL);
        let now = read();
        if shown.elapsed() < interval || now == before {
            continue;
        }
        shown = Instant::now();
        let (rows, tokens) = (now.0 - before.0, now.1 - before.1);
        let per_second = tokens as f64 / started.elapsed().as_secs_f64();
        let line = format!("{rows} rows inferred, {tokens} tokens, {per_second:.0} tokens/s");
        match mode {
            ProgressMode::Bar => {
                bar.set_message(line);
                bar.tick();
            }
            ProgressMode::Json => {
                eprintln!(
                    "{}",
                    json!({"rows_inferred": rows, "tokens": tokens, "tokens_per_second": per_second.round()})
                );
            }
            _ => eprintln!("{line}"),
        }
    }
    // A bar that has shown nothing leaves the terminal alone.
    if mode == ProgressMode::Bar && !bar.message().is_empty() {
        bar.set_message("");
        bar.finish_and_clear();
        bar.reset();
    }
}
