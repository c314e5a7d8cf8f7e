//! `mistral-batch schemas`, for the makers of this program.

use std::fs;
use std::path::PathBuf;

use clap::Args;

use crate::error::{Error, Result};
use crate::eval;
use crate::job::schema;

/// Write the JSON Schemas of job files, of sweep files and of the commands' output columns.
#[derive(Debug, Args)]
pub struct SchemasArgs {
    /// Folder to write them to
    #[arg(long, value_name = "DIR", default_value = "schemas")]
    write: PathBuf,
}

impl SchemasArgs {
    pub fn run(self) -> Result<()> {
        let mut files = schema::files();
        files.insert("sweep.schema.json".to_owned(), eval::spec::schema());
        for (name, schema) in files {
            let path = self.write.join(name);
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
            }
            let text = serde_json::to_string_pretty(&schema).map_err(|error| Error::Internal(error.to_string()))?;
            fs::write(&path, text + "\n").map_err(Error::io("write", &path))?;
        }
        Ok(())
    }
}
