//! The digest of an output, as a person can compute it too.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::output::OutputTarget;
use super::part::unit_of_name;
use crate::error::{Error, Result};

/// Hex SHA-256 of a finished output: of the single file, or of the parts as `sha256sum part-*.parquet | sha256sum` gives
/// it inside of the folder.
///
/// # Errors
/// [`Error::Io`] when a file cannot be read.
pub fn output_sha256(target: &OutputTarget) -> Result<String> {
    if let OutputTarget::File { path, .. } = target {
        return file_sha256(path);
    }
    let mut list = String::new();
    for part in output_files(target)? {
        list.push_str(&format!("{}  {}\n", file_sha256(&part)?, name(&part)));
    }
    Ok(format!("{:x}", Sha256::digest(list)))
}

/// The files of a finished output in the order of their rows.
///
/// # Errors
/// [`Error::Io`] when the folder cannot be read.
pub fn output_files(target: &OutputTarget) -> Result<Vec<PathBuf>> {
    let dir = match target {
        OutputTarget::File { path, .. } => return Ok(vec![path.clone()]),
        OutputTarget::Directory(dir) => dir,
    };
    let entries = fs::read_dir(dir).map_err(Error::io("read", dir))?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path()));
    let mut parts: Vec<PathBuf> = paths.collect::<io::Result<_>>().map_err(Error::io("read", dir))?;
    parts.retain(|path| unit_of_name(&name(path)).is_some());
    parts.sort();
    Ok(parts)
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn file_sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let mut digest = Sha256::new();
    io::copy(&mut file, &mut digest).map_err(Error::io("read", path))?;
    Ok(format!("{:x}", digest.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_what_sha256sum_says() {
        let temp = tempfile::tempdir().unwrap();
        fs::write(temp.path().join("part-000001.parquet"), "b").unwrap();
        fs::write(temp.path().join("part-000000.parquet"), "a").unwrap();
        fs::write(temp.path().join("_SUCCESS.json"), "{}").unwrap();
        // (cd "$dir" && sha256sum part-*.parquet | sha256sum)
        assert_eq!(output_sha256(&OutputTarget::Directory(temp.path().to_owned())).unwrap(), EXPECTED);
        let file = temp.path().join("x.csv");
        fs::write(&file, "a").unwrap();
        assert_eq!(
            output_sha256(&OutputTarget::new(file)).unwrap(),
            "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
        );
    }

    const EXPECTED: &str = "809a1969749093da92a4c1838b1691b87496f144369ed277abb8c0cf904f0631";
}
