//! The sqllogictest files beside this one.

use std::path::Path;

use arrow::util::display::{ArrayFormatter, FormatOptions};
use async_trait::async_trait;
use datafusion::error::DataFusionError;
use datafusion::prelude::SessionContext;
use sqllogictest::{AsyncDB, DBOutput, DefaultColumnType, Runner, strict_column_validator};

use super::support::{project, runtime, session};

struct Database(SessionContext);

#[async_trait]
impl AsyncDB for Database {
    type Error = DataFusionError;
    type ColumnType = DefaultColumnType;

    async fn run(&mut self, sql: &str) -> Result<DBOutput<DefaultColumnType>, DataFusionError> {
        let frame = mistral_batch::sql::query(&self.0, sql).await?;
        let schema = frame.schema().clone();
        let batches = frame.collect().await?;
        if schema.fields().is_empty() {
            return Ok(DBOutput::StatementComplete(0));
        }
        let options = FormatOptions::default().with_null("NULL");
        let mut rows = Vec::new();
        for batch in &batches {
            let columns: Vec<_> = batch
                .columns()
                .iter()
                .map(|column| ArrayFormatter::try_new(column, &options))
                .collect::<Result<_, _>>()?;
            rows.extend((0..batch.num_rows()).map(|row| {
                let value = |column: &ArrayFormatter| match column.value(row).to_string() {
                    text if text.is_empty() => "(empty)".to_owned(),
                    text => text,
                };
                columns.iter().map(value).collect::<Vec<String>>()
            }));
        }
        let types = schema.fields().iter().map(|field| match field.data_type() {
            data_type if data_type.is_integer() => DefaultColumnType::Integer,
            data_type if data_type.is_floating() => DefaultColumnType::FloatingPoint,
            _ => DefaultColumnType::Text,
        });
        Ok(DBOutput::Rows { types: types.collect(), rows })
    }

    async fn shutdown(&mut self) {}
}

#[test]
fn scripts_give_what_they_say() {
    let runtime = runtime();
    let mut scripts: Vec<_> = std::fs::read_dir(Path::new(&project("tests/sql")))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "slt"))
        .collect();
    scripts.sort();
    assert!(scripts.len() >= 3);
    let mut failures = Vec::new();
    for script in scripts {
        let mut runner = Runner::new(|| async { Ok(Database(session().await)) });
        runner.with_column_validator(strict_column_validator);
        if let Err(error) = runtime.block_on(runner.run_file_async(&script)) {
            failures.push(format!("{}: {error}", script.display()));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
