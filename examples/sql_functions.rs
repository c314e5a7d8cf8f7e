//! Adds the model functions to a program's own SessionContext: `cargo run --release --example sql_functions`.

use std::sync::Arc;

use datafusion::error::Result;
use datafusion::prelude::{ParquetReadOptions, SessionContext};
use mistral_batch::sql::{self, ModelRegistry, RegistryOptions};

#[tokio::main]
async fn main() -> Result<()> {
    // Models by name; weights are loaded when a query first needs them.
    let models = Arc::new(ModelRegistry::new(RegistryOptions::default()));
    models.add("tickets", "sample-data/models/ticket-classifier").map_err(|error| {
        datafusion::error::DataFusionError::External(Box::new(error)) // says what is wrong with the folder
    })?;

    // Any session will do, with whatever it has registered already.
    let context = SessionContext::new();
    sql::register(&context, models)?;
    context.register_parquet("tickets", "sample-data/tickets.parquet", ParquetReadOptions::default()).await?;

    // The model runs once per row, however often its result is used, and only for rows that pass the cheap filter.
    let answer = sql::query(
        &context,
        "SELECT ai_classify(text).label AS label, count(*) AS tickets, avg(ai_classify(text).score) AS mean_score
         FROM tickets WHERE length(text) > 200 GROUP BY label ORDER BY label",
    )
    .await?;
    answer.show().await
}
