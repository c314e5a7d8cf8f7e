//! Models as SQL functions: `SELECT ai_classify(text).label FROM tickets`.
//!
//! [`register`] adds the [`functions`] to any DataFusion session. In a query they are markers: they know their types, and
//! nothing can call them. What happens to `SELECT id, ai_classify(text).label FROM tickets WHERE lang = 'en'`:
//!
//! 1. [`analyzer`] finds each distinct call and hoists it into an [`node::InferNode`] below the operator that uses it. The
//!    call becomes a column, so that it can be used any number of times at the price of one inference a row.
//! 2. DataFusion's optimizer pushes filters that do not need the column below the node, and limits, too; [`optimizer`]
//!    removes nodes whose column nobody reads.
//! 3. [`planner`] plans the node as an [`exec::InferExec`], whatever planner the session has for the rest.
//! 4. [`exec::InferExec`] buffers rows over many record batches into a window, hands their texts to the one [`worker`] of
//!    the model, which sorts them by length and computes them as every command does, and gives the rows on in their order.
//!
//! [`models`] holds the checkpoints by name: loaded at their first use, once in a process, however many queries use them.

pub mod analyzer;
mod call;
mod errors;
pub mod exec;
mod files;
pub mod functions;
mod models;
mod models_table;
pub mod node;
pub mod optimizer;
pub mod planner;
mod settings;
mod statements;
mod worker;

use std::sync::Arc;

use datafusion::catalog::{MemorySchemaProvider, SchemaProvider};
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::session_state::SessionStateBuilder;
use datafusion::prelude::SessionContext;

pub use call::ModelCall;
pub use errors::to_error;
pub use files::with_file_tables;
pub use models::{ModelRegistry, RegistryOptions, SqlModel, SqlProgress};
pub use settings::{OnError, SqlSettings};
pub use statements::{parse_statements, query};

use analyzer::HoistModelCalls;
use models_table::ModelsTable;
use optimizer::PruneModelCalls;
use planner::InferQueryPlanner;

/// The schema of the table that lists the models.
const SCHEMA: &str = "mistral";

/// Adds the functions over `models` to a session, with the table `mistral.models` and the settings `mistral.*`.
///
/// The session's own query planner goes on planning everything else.
///
/// # Errors
/// When the session has no default catalog, or its catalog takes no schema.
pub fn register(context: &SessionContext, models: Arc<ModelRegistry>) -> Result<()> {
    let state = context.state();
    let mut config = state.config().clone();
    config.options_mut().extensions.insert(SqlSettings::new(models.clone()));
    let mut builder = SessionStateBuilder::new_from_existing(state.clone())
        .with_session_id(state.session_id().to_owned())
        .with_config(config)
        .with_query_planner(Arc::new(InferQueryPlanner::around(state.query_planner().clone())))
        .with_analyzer_rule(Arc::new(HoistModelCalls::default()))
        .with_optimizer_rule(Arc::new(PruneModelCalls));
    let functions = builder.scalar_functions().get_or_insert_default();
    functions.extend(functions::all(&models).into_iter().map(Arc::new));
    *context.state_ref().write() = builder.build();

    let catalog_name = &state.config_options().catalog.default_catalog;
    let catalog = context
        .catalog(catalog_name)
        .ok_or_else(|| DataFusionError::Configuration(format!("the session has no catalog '{catalog_name}'")))?;
    let schema = MemorySchemaProvider::new();
    schema.register_table("models".to_owned(), Arc::new(ModelsTable::new(models)))?;
    catalog.register_schema(SCHEMA, Arc::new(schema))?;
    Ok(())
}
