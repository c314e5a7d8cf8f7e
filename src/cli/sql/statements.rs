//! Runs statements one after the other, each stopped by a signal.

use std::future::Future;

use datafusion::error::DataFusionError;
use datafusion::prelude::SessionContext;
use futures::StreamExt;
use tokio::signal::unix::{SignalKind, signal};

use super::output::Output;
use super::progress::QueryProgress;
use crate::error::{Error, ExitCode, Result};
use crate::sql::{parse_statements, to_error};

/// A session on the command line.
pub struct Session {
    context: SessionContext,
    output: Output,
    progress: QueryProgress,
    quiet: bool,
}

impl Session {
    pub fn new(context: SessionContext, output: Output, progress: QueryProgress, quiet: bool) -> Self {
        Self { context, output, progress, quiet }
    }

    /// Runs the statements of a script until the first that fails.
    ///
    /// # Errors
    /// [`Error::Query`] saying which statement failed, behind `place`, and why.
    pub async fn run_script(&mut self, text: &str, place: &str) -> Result<()> {
        let at = |number: usize, count: usize, error: Error| {
            let statement = if count > 1 { format!("statement {number}: ") } else { String::new() };
            Error::Query { code: error.exit_code(), message: format!("{place}{statement}{error}") }
        };
        let statements = parse_statements(text).map_err(|error| at(1, 1, to_error(error)))?;
        let count = statements.len();
        for (index, statement) in statements.into_iter().enumerate() {
            let context = self.context.clone();
            let query = async move {
                let plan = context.state().statement_to_plan(statement).await?;
                context.execute_logical_plan(plan).await
            };
            self.progress.start();
            let result = self.run_query(query).await;
            self.progress.stop();
            let rows = result.map_err(|error| at(index + 1, count, error))?;
            if let (Some(rows), false) = (rows, self.quiet || !self.output.is_for_people()) {
                eprintln!("{rows} row(s)");
            }
        }
        Ok(())
    }

    /// Ends the output.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(&mut self) -> Result<()> {
        self.output.finish()
    }

    /// Runs one statement; the number of its rows where it has any.
    async fn run_query(
        &mut self,
        frame: impl Future<Output = Result<datafusion::dataframe::DataFrame, DataFusionError>>,
    ) -> Result<Option<u64>> {
        let output = &mut self.output;
        let progress = &self.progress;
        let work = async {
            let frame = frame.await.map_err(to_error)?;
            if frame.schema().fields().is_empty() {
                // A statement such as CREATE TABLE has done its work by now; others do it when they are run.
                frame.collect().await.map_err(to_error)?;
                return Ok(None);
            }
            let mut batches = frame.execute_stream().await.map_err(to_error)?;
            let mut rows = 0;
            output.begin(batches.schema())?;
            while let Some(batch) = batches.next().await {
                let batch = batch.map_err(to_error)?;
                rows += batch.num_rows() as u64;
                progress.suspend(|| output.write(&batch))?;
            }
            progress.suspend(|| output.end())?;
            Ok(Some(rows))
        };
        // Whatever is dropped stops computing.
        tokio::select! {
            result = work => result,
            code = stop_signal() => {
                let name = if code == ExitCode::Terminated { "SIGTERM" } else { "SIGINT" };
                Err(Error::Query { code, message: format!("cancelled by {name}") })
            }
        }
    }
}

/// Waits for SIGINT or SIGTERM.
async fn stop_signal() -> ExitCode {
    let (Ok(mut interrupts), Ok(mut terminations)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupts.recv() => ExitCode::Interrupted,
        _ = terminations.recv() => ExitCode::Terminated,
    }
}
