//! `mistral-batch completions`.

use clap::Args;
use clap_complete::{Shell, generate};

use crate::error::Result;

/// Print a completion script for a shell.
///
/// For bash: mistral-batch completions bash > ~/.local/share/bash-completion/completions/mistral-batch
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

impl CompletionsArgs {
    pub fn run(self) -> Result<()> {
        let mut script = Vec::new();
        generate(self.shell, &mut super::command(), "mistral-batch", &mut script);
        super::print(&String::from_utf8_lossy(&script))
    }
}
