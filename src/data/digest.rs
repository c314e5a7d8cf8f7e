//! The digest of an output, as a person can compute it too.

use std::io;

use sha2::{Digest, Sha256};

use super::output::OutputTarget;
use super::part::unit_of_name;
use super::store::Location;
use crate::error::{Error, Result};

/// Hex SHA-256 of a finished output: of the single file, or of the parts as `sha256sum part-*.parquet | sha256sum` gives
/// it inside of the folder.
///
/// # Errors
/// [`Error::Io`] or [`Error::Store`] when a file cannot be read.
pub fn output_sha256(target: &OutputTarget) -> Result<String> {
    if let OutputTarget::File { place, .. } = target {
        return file_sha256(place);
    }
    let mut list = String::new();
    for part in output_files(target)? {
        list.push_str(&format!("{}  {}\n", file_sha256(&part)?, part.name()));
    }
    Ok(format!("{:x}", Sha256::digest(list)))
}

/// The files of a finished output in the order of their rows.
///
/// # Errors
/// [`Error::Io`] or [`Error::Store`] when the folder cannot be read.
pub fn output_files(target: &OutputTarget) -> Result<Vec<Location>> {
    let dir = match target {
        OutputTarget::File { place, .. } => return Ok(vec![place.clone()]),
        OutputTarget::Directory(dir) => dir,
    };
    let parts = dir.entries()?.into_iter().filter(|entry| unit_of_name(&entry.name).is_some());
    Ok(parts.map(|entry| entry.location).collect())
}

/// Hex SHA-256 of a file or an object.
///
/// # Errors
/// [`Error::Io`] or [`Error::Store`] when it cannot be read.
pub(super) fn file_sha256(place: &Location) -> Result<String> {
    let Some(stored) = place.file()? else {
        return Err(Error::io("open", place.path())(io::ErrorKind::NotFound.into()));
    };
    let mut digest = Sha256::new();
    let copied = io::copy(&mut stored.open()?, &mut digest);
    copied.map_err(|error| stored.explain(Error::io("read", place.path())(error)))?;
    Ok(format!("{:x}", digest.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn it_is_what_sha256sum_says() {
        let temp = tempfile::tempdir().unwrap();
        fs::write(temp.path().join("part-000001.parquet"), "b").unwrap();
        fs::write(temp.path().join("part-000000.parquet"), "a").unwrap();
        fs::write(temp.path().join("_SUCCESS.json"), "{}").unwrap();
        // (cd "$dir" && sha256sum part-*.parquet | sha256sum)
        assert_eq!(output_sha256(&OutputTarget::Directory(temp.path().into())).unwrap(), EXPECTED);
        let file = temp.path().join("x.csv");
        fs::write(&file, "a").unwrap();
        assert_eq!(
            output_sha256(&OutputTarget::new(file)).unwrap(),
            "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
        );
    }

    const EXPECTED: &str = "809a1969749093da92a4c1838b1691b87496f144369ed277abb8c0cf904f0631";
}
