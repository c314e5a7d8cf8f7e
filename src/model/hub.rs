//! `--model`: a checkpoint folder, or a hub id that the local Hugging Face cache holds.

use std::env;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Finds the checkpoint folder that `model` names: a directory, or `org/name[@revision]` in the local cache.
///
/// The cache is where huggingface_hub keeps it: `HF_HUB_CACHE`, else `HF_HOME/hub`, else
/// `~/.cache/huggingface/hub`. Nothing is downloaded.
///
/// # Errors
/// [`Error::Config`] saying how to get the checkpoint when it is neither.
pub fn resolve(model: &str) -> Result<PathBuf> {
    resolve_in(model, &hub_cache())
}

fn resolve_in(model: &str, cache: &Path) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(path.to_owned());
    }
    if path.exists() {
        return Err(Error::config(path, "is a file; --model wants the folder that holds config.json"));
    }
    let (id, revision) = model.split_once('@').unwrap_or((model, "main"));
    if !is_hub_id(id) {
        return Err(Error::config(path, "no such folder; --model wants a checkpoint folder or a hub id as org/name"));
    }
    let repository = cache.join(format!("models--{}", id.replace('/', "--")));
    // A revision is a branch or tag, whose file under refs/ names the commit, or the commit itself.
    let reference = repository.join("refs").join(revision);
    let commit = match std::fs::read_to_string(&reference) {
        Ok(commit) => commit.trim().to_owned(),
        Err(_) => revision.to_owned(),
    };
    let snapshot = repository.join("snapshots").join(&commit);
    if is_plain(&commit) && snapshot.is_dir() {
        return Ok(snapshot);
    }
    Err(Error::config(
        path,
        format!(
            "neither a folder nor in the local cache {}; get it with: hf download {id}{}",
            cache.display(),
            if revision == "main" { String::new() } else { format!(" --revision {revision}") }
        ),
    ))
}

/// Where huggingface_hub keeps its downloads (`huggingface_hub/constants.py`).
fn hub_cache() -> PathBuf {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(cache) = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE")) {
        return cache;
    }
    let home = set("HF_HOME").unwrap_or_else(|| {
        let cache = set("XDG_CACHE_HOME").unwrap_or_else(|| set("HOME").unwrap_or_default().join(".cache"));
        cache.join("huggingface")
    });
    home.join("hub")
}

/// `name` or `org/name`, as the hub allows.
fn is_hub_id(id: &str) -> bool {
    let parts: Vec<&str> = id.split('/').collect();
    parts.len() <= 2 && parts.iter().all(|part| is_plain(part))
}

/// One path component of harmless characters that does not climb.
fn is_plain(part: &str) -> bool {
    !part.is_empty()
        && !part.starts_with('.')
        && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> tempfile::TempDir {
        let cache = tempfile::tempdir().unwrap();
        let repository = cache.path().join("models--acme--tickets");
        std::fs::create_dir_all(repository.join("refs")).unwrap();
        std::fs::create_dir_all(repository.join("snapshots/0a1b2c")).unwrap();
        std::fs::write(repository.join("refs/main"), "0a1b2c\n").unwrap();
        cache
    }

    #[test]
    fn finds_a_snapshot_by_branch_and_by_commit() {
        let cache = cache();
        let snapshot = cache.path().join("models--acme--tickets/snapshots/0a1b2c");
        for model in ["acme/tickets", "acme/tickets@main", "acme/tickets@0a1b2c"] {
            assert_eq!(resolve_in(model, cache.path()).unwrap(), snapshot);
        }
    }

    #[test]
    fn says_how_to_get_what_is_not_there() {
        let cache = cache();
        let message = resolve_in("acme/other@v2", cache.path()).unwrap_err().to_string();
        assert!(message.contains("hf download acme/other --revision v2"), "{message}");
        let message = resolve_in("./acme/../x/y", cache.path()).unwrap_err().to_string();
        assert!(message.contains("no such folder"), "{message}");
    }

    #[test]
    fn a_folder_wins_and_a_file_is_refused() {
        let cache = cache();
        let folder = cache.path().to_str().unwrap();
        assert_eq!(resolve_in(folder, Path::new("/nowhere")).unwrap(), cache.path());
        let file = cache.path().join("models--acme--tickets/refs/main");
        assert!(resolve_in(file.to_str().unwrap(), cache.path()).unwrap_err().to_string().contains("is a file"));
    }
}
