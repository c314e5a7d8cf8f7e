//! `mistral.models`: the models that queries can name.

use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, ListBuilder, RecordBatch, StringArray, StringBuilder, UInt64Array};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::datasource::MemTable;
use datafusion::error::Result;
use datafusion::logical_expr::{Expr, TableType};
use datafusion::physical_plan::ExecutionPlan;

use super::functions;
use super::models::ModelRegistry;

/// The table; it shows the registry as it is when it is read.
#[derive(Debug)]
pub struct ModelsTable {
    models: Arc<ModelRegistry>,
    schema: SchemaRef,
}

impl ModelsTable {
    pub fn new(models: Arc<ModelRegistry>) -> Self {
        let texts = |name| Field::new_list(name, Field::new_list_field(DataType::Utf8, true), false);
        let schema = Schema::new(vec![
            Field::new("name", DataType::Utf8, false),
            Field::new("path", DataType::Utf8, false),
            Field::new("architecture", DataType::Utf8, false),
            texts("functions"),
            texts("labels"),
            Field::new("hidden_size", DataType::UInt64, false),
            Field::new("loaded", DataType::Boolean, false),
        ]);
        Self { models, schema: Arc::new(schema) }
    }

    fn rows(&self) -> Result<RecordBatch> {
        let models = self.models.list();
        let text = |value: fn(&super::SqlModel) -> &str| -> ArrayRef {
            Arc::new(StringArray::from_iter_values(models.iter().map(|model| value(model))))
        };
        let (mut names, mut labels) = (ListBuilder::new(StringBuilder::new()), ListBuilder::new(StringBuilder::new()));
        for model in &models {
            let fitting = functions::kinds().into_iter().filter(|function| function.return_type(model).is_ok());
            names.append_value(fitting.map(|function| Some(function.name())));
            labels.append_value(model.labels().iter().map(Some));
        }
        Ok(RecordBatch::try_new(
            self.schema.clone(),
            vec![
                text(|model| model.name()),
                text(|model| model.path()),
                text(|model| model.checkpoint().config.architecture.class_name()),
                Arc::new(names.finish()),
                Arc::new(labels.finish()),
                Arc::new(UInt64Array::from_iter_values(
                    models.iter().map(|model| model.checkpoint().config.hidden_size as u64),
                )),
                Arc::new(models.iter().map(|model| Some(model.is_loaded())).collect::<BooleanArray>()),
            ],
        )?)
    }
}

#[async_trait]
impl TableProvider for ModelsTable {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn table_type(&self) -> TableType {
        TableType::View
    }

    async fn scan(
        &self,
        session: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let table = MemTable::try_new(self.schema.clone(), vec![vec![self.rows()?]])?;
        table.scan(session, projection, filters, limit).await
    }
}
