//! The logical node of a hoisted call: its input's rows with one more column.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use arrow::datatypes::Field;
use datafusion::common::{DFSchema, DFSchemaRef, internal_err};
use datafusion::error::Result;
use datafusion::logical_expr::{Expr, LogicalPlan, UserDefinedLogicalNodeCore};

use super::call::ModelCall;

/// A call over every row of its input, in a column behind the input's.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct InferNode {
    input: LogicalPlan,
    call: Arc<ModelCall>,
    argument: Expr,
    output: String,
    /// Whether a limit above may need few of the rows only.
    stops_early: bool,
    schema: DFSchemaRef,
}

impl InferNode {
    /// Adds the column `output` to `input`: `call` of `argument`.
    ///
    /// # Errors
    /// When `input` has a column of that name.
    pub fn try_new(
        input: LogicalPlan,
        call: Arc<ModelCall>,
        argument: Expr,
        output: String,
        stops_early: bool,
    ) -> Result<Self> {
        let field = Arc::new(Field::new(&output, call.return_type.clone(), true));
        let fields = input.schema().iter().map(|(qualifier, field)| (qualifier.cloned(), field.clone()));
        let fields = fields.chain([(None, field)]).collect();
        let schema = Arc::new(DFSchema::new_with_metadata(fields, input.schema().metadata().clone())?);
        Ok(Self { input, call, argument, output, stops_early, schema })
    }

    pub fn call(&self) -> &Arc<ModelCall> {
        &self.call
    }

    /// The text, or chat, that goes to the model.
    pub fn argument(&self) -> &Expr {
        &self.argument
    }

    /// The name of the column that it adds; no other node of a plan has it.
    pub fn output(&self) -> &str {
        &self.output
    }

    pub fn input(&self) -> &LogicalPlan {
        &self.input
    }

    pub fn stops_early(&self) -> bool {
        self.stops_early
    }

    /// The same node below a limit.
    pub fn stopping_early(&self) -> Self {
        Self { stops_early: true, ..self.clone() }
    }
}

impl PartialOrd for InferNode {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        self.output.partial_cmp(&other.output)
    }
}

impl UserDefinedLogicalNodeCore for InferNode {
    fn name(&self) -> &str {
        "Infer"
    }

    fn inputs(&self) -> Vec<&LogicalPlan> {
        vec![&self.input]
    }

    fn schema(&self) -> &DFSchemaRef {
        &self.schema
    }

    fn expressions(&self) -> Vec<Expr> {
        vec![self.argument.clone()]
    }

    /// Only what reads the result has to wait for it.
    fn prevent_predicate_push_down_columns(&self) -> HashSet<String> {
        HashSet::from([self.output.clone()])
    }

    fn fmt_for_explain(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Infer: {}, argument={} AS {}", self.call, self.argument, self.output)
    }

    fn with_exprs_and_inputs(&self, mut exprs: Vec<Expr>, mut inputs: Vec<LogicalPlan>) -> Result<Self> {
        match (exprs.pop(), inputs.pop()) {
            (Some(argument), Some(input)) if exprs.is_empty() && inputs.is_empty() => {
                Self::try_new(input, self.call.clone(), argument, self.output.clone(), self.stops_early)
            }
            _ => internal_err!("Infer has one expression and one input"),
        }
    }

    fn necessary_children_exprs(&self, output_columns: &[usize]) -> Option<Vec<Vec<usize>>> {
        // The argument's columns are added by the optimizer itself.
        let result = self.schema.fields().len() - 1;
        Some(vec![output_columns.iter().copied().filter(|&column| column != result).collect()])
    }

    fn supports_limit_pushdown(&self) -> bool {
        true // as many rows out as in, in their order
    }
}
