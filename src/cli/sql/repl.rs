//! The interactive prompt.

use std::path::PathBuf;

use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use tokio::runtime::Runtime;

use super::statements::Session;
use crate::error::{Error, Result};

const HELP: &str = "\
Statements end with a semicolon and may take several lines. FROM 'file.parquet' reads a file; SELECT * FROM mistral.models
lists the models; SET mistral.models.NAME = 'DIR' adds one. Ctrl-C cancels a query, Ctrl-D or \\q leaves.";

/// Reads statements and runs them; one that fails is told and leaves the prompt as it was.
///
/// # Errors
/// When the terminal cannot be read.
pub fn run(runtime: &Runtime, session: &mut Session) -> Result<()> {
    let terminal = |error: ReadlineError| Error::io("read from", "the terminal")(std::io::Error::other(error));
    let mut editor = DefaultEditor::new().map_err(terminal)?;
    let history = history_file();
    if let Some(path) = &history {
        // The first session has none yet.
        let _ = editor.load_history(path);
    }
    eprintln!("mistral-batch {}; \\? for help", env!("CARGO_PKG_VERSION"));
    let mut text = String::new();
    loop {
        match editor.readline(if text.is_empty() { "sql> " } else { "  -> " }) {
            Ok(line) => {
                match (text.is_empty(), line.trim()) {
                    (true, "") => continue,
                    (true, "\\q" | "quit" | "exit" | "quit;" | "exit;") => break,
                    (true, "\\?" | "\\h" | "help") => {
                        eprintln!("{HELP}");
                        continue;
                    }
                    _ => {}
                }
                text.push_str(&line);
                text.push('\n');
                if !text.trim_end().ends_with(';') {
                    continue;
                }
                // A history that is full or refuses a line is no reason to refuse the statement.
                let _ = editor.add_history_entry(text.trim_end());
                if let Err(error) = runtime.block_on(session.run_script(&text, "")) {
                    eprintln!("error: {error}");
                }
                text.clear();
            }
            Err(ReadlineError::Interrupted) => text.clear(),
            Err(ReadlineError::Eof) => break,
            Err(error) => return Err(terminal(error)),
        }
    }
    if let Some(path) = &history
        && let Some(folder) = path.parent()
        && let Err(error) =
            std::fs::create_dir_all(folder).map_err(ReadlineError::from).and_then(|()| editor.save_history(path))
    {
        eprintln!("the history could not be kept in {}: {error}", path.display());
    }
    session.finish()
}

/// `$XDG_STATE_HOME/mistral-batch/sql_history`, as the XDG base directory specification has it.
fn history_file() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let state = set("XDG_STATE_HOME").or_else(|| set("HOME").map(|home| home.join(".local/state")))?;
    Some(state.join("mistral-batch/sql_history"))
}
