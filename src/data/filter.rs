//! `--where`: a SQL condition over the input's columns, planned and evaluated by DataFusion.

use std::sync::Arc;

use arrow::array::{Array, AsArray, BooleanArray, RecordBatch};
use arrow::compute::{and_kleene, filter_record_batch, is_not_null};
use arrow::datatypes::{DataType, Schema};
use datafusion::common::DFSchema;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::utils::collect_columns;
use datafusion::prelude::{SessionConfig, SessionContext};

use crate::error::{Error, Result, one_line};

/// A condition that rows must meet; where it is null they do not.
#[derive(Debug, Clone)]
pub struct RowFilter {
    sql: String,
    condition: Arc<dyn PhysicalExpr>,
}

impl RowFilter {
    /// Plans `sql` for batches of `schema`. Column names keep their case.
    ///
    /// # Errors
    /// [`Error::Usage`] when it is not one boolean SQL expression over these columns, or gives another answer each time.
    pub fn compile(sql: &str, schema: &Schema) -> Result<Self> {
        let usage = |message: String| Error::Usage(format!("--where \"{sql}\": {message}"));
        let planning = |error: datafusion::error::DataFusionError| usage(one_line(error.strip_backtrace()));

        let mut config = SessionConfig::new();
        config.options_mut().sql_parser.enable_ident_normalization = false;
        let context = SessionContext::new_with_config(config);
        let schema = DFSchema::try_from(schema.clone()).map_err(planning)?;
        let expression = context.parse_sql_expr(sql, &schema).map_err(planning)?;
        if expression.is_volatile() {
            return Err(usage("gives another answer each time, so that a resumed job would not be the same".into()));
        }
        let condition = context.create_physical_expr(expression, &schema).map_err(planning)?;
        match condition.data_type(schema.as_arrow()).map_err(planning)? {
            DataType::Boolean => Ok(Self { sql: sql.to_owned(), condition }),
            other => Err(usage(format!("is {other}, not a condition"))),
        }
    }

    /// The same condition for batches of another schema.
    ///
    /// # Errors
    /// As [`RowFilter::compile`].
    pub fn for_schema(&self, schema: &Schema) -> Result<Self> {
        Self::compile(&self.sql, schema)
    }

    /// The names of the columns that the condition reads.
    pub fn columns(&self) -> Vec<String> {
        let mut columns: Vec<String> =
            collect_columns(&self.condition).iter().map(|column| column.name().to_owned()).collect();
        columns.sort_unstable();
        columns
    }

    /// Which rows of `batch` pass.
    ///
    /// # Errors
    /// [`Error::Usage`] when the condition fails on a value, as a division by zero does.
    pub fn passing(&self, batch: &RecordBatch) -> Result<BooleanArray> {
        let failed = |message: String| Error::Usage(format!("--where \"{}\": {message}", self.sql));
        let values = self
            .condition
            .evaluate(batch)
            .and_then(|value| value.into_array(batch.num_rows()))
            .map_err(|error| failed(one_line(error.strip_backtrace())))?;
        let passing = values.as_boolean_opt().ok_or_else(|| failed("is not a condition".into()))?;
        // A null is no pass; without nulls the mask can be counted and indexed plainly.
        if passing.null_count() == 0 {
            return Ok(passing.clone());
        }
        let known = and_kleene(passing, &is_not_null(passing)?)?;
        Ok(BooleanArray::new(known.values() & is_not_null(passing)?.values(), None))
    }

    /// The rows of `batch` that pass.
    ///
    /// # Errors
    /// As [`RowFilter::passing`].
    pub fn apply(&self, batch: &RecordBatch) -> Result<(RecordBatch, BooleanArray)> {
        let passing = self.passing(batch)?;
        Ok((filter_record_batch(batch, &passing)?, passing))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Int64Array, StringArray};
    use arrow::datatypes::Field;

    fn batch() -> RecordBatch {
        let schema =
            Schema::new(vec![Field::new("Topic", DataType::Utf8, true), Field::new("n", DataType::Int64, true)]);
        let topics = StringArray::from(vec![Some("bug"), Some("praise"), None, Some("bug")]);
        let numbers = Int64Array::from(vec![Some(1), Some(2), Some(3), None]);
        RecordBatch::try_new(Arc::new(schema), vec![Arc::new(topics), Arc::new(numbers)]).unwrap()
    }

    fn passing(sql: &str) -> Vec<bool> {
        let batch = batch();
        let filter = RowFilter::compile(sql, &batch.schema()).unwrap();
        let mask = filter.passing(&batch).unwrap();
        assert_eq!(mask.null_count(), 0);
        assert_eq!(filter.apply(&batch).unwrap().0.num_rows(), mask.true_count());
        mask.values().iter().collect()
    }

    #[test]
    fn conditions_follow_sql() {
        assert_eq!(passing("Topic = 'bug'"), [true, false, false, true]);
        assert_eq!(passing("n > 1"), [false, true, true, false], "null is no pass");
        assert_eq!(passing("n IS NULL OR Topic LIKE 'pr%'"), [false, true, false, true]);
        assert_eq!(passing("length(Topic) = 3 AND n < 2.5"), [true, false, false, false]);
        assert_eq!(passing("true"), [true; 4]);
    }

    #[test]
    fn names_the_columns_it_reads() {
        let columns = RowFilter::compile("n > 1 AND n < 9", &batch().schema()).unwrap().columns();
        assert_eq!(columns, ["n"]);
    }

    #[test]
    fn what_is_no_condition_is_a_usage_error() {
        for sql in
            ["missing = 1", "n + 1", "n >", "n > 1; DROP TABLE x", "random() < 0.5", "sum(n) > 1", "topic = 'bug'"]
        {
            let error = RowFilter::compile(sql, &batch().schema()).expect_err(sql);
            assert_eq!(error.exit_code(), crate::ExitCode::Usage, "{sql}");
            assert!(error.to_string().starts_with("--where"), "{error}");
        }
    }
}
