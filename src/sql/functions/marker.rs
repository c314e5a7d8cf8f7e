//! What stands for a call in a query until the analyzer hoists it.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, FieldRef};
use datafusion::common::{DFSchema, ScalarValue, plan_datafusion_err, plan_err};
use datafusion::error::Result;
use datafusion::execution::context::ExecutionProps;
use datafusion::logical_expr::physical_planning_context::PhysicalPlanningContext;
use datafusion::logical_expr::{
    ColumnarValue, Expr, ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};
use datafusion::physical_expr::create_physical_expr;

use super::ModelFunction;
use super::options::{CallOptions, check_name};
use crate::data::text_column::is_text;
use crate::error::nearest_name;
use crate::sql::call::ModelCall;
use crate::sql::models::{ModelRegistry, SqlModel};
use crate::text::ChatTemplate;

/// A function that knows its types and cannot be invoked: `name(text[, model[, options]])`.
#[derive(Debug)]
pub struct ModelFunctionMarker {
    function: Arc<dyn ModelFunction>,
    models: Arc<ModelRegistry>,
    signature: Signature,
    aliases: Vec<String>,
}

impl ModelFunctionMarker {
    /// The marker of `function`, whose calls name one of `models`.
    pub fn new(function: Arc<dyn ModelFunction>, models: Arc<ModelRegistry>) -> Self {
        let first = if function.accepts_chats() { "prompt" } else { "text" };
        let names =
            if function.option_names().is_empty() { vec![first, "model"] } else { vec![first, "model", "options"] };
        let unnamed = Signature::user_defined(Volatility::Stable);
        Self {
            signature: unnamed.clone().with_parameter_names(names).unwrap_or(unnamed),
            aliases: function.aliases().iter().map(|alias| alias.to_string()).collect(),
            function,
            models,
        }
    }

    /// The marker behind a function, if it is one.
    pub fn of(function: &ScalarUDF) -> Option<&Self> {
        (&**function.inner() as &dyn std::any::Any).downcast_ref()
    }

    /// What a call with these arguments is to compute.
    ///
    /// # Errors
    /// A plan error that names the argument that is wrong.
    pub fn call(&self, arguments: &[Expr]) -> Result<ModelCall> {
        let name = self.function.name();
        let mut constants = Vec::new();
        for (index, argument) in arguments.iter().enumerate().skip(1) {
            constants.push(constant(argument).map_err(|error| {
                plan_datafusion_err!("{name}: argument {} ({argument}) must be a constant: {error}", index + 1)
            })?);
        }
        // A struct in the second place is the options of the only model that fits.
        let options_at = constants.iter().position(|constant| matches!(constant, ScalarValue::Struct(_)));
        let options = match options_at {
            None => CallOptions::default(),
            Some(at) => CallOptions::from_struct(&constants.remove(at), self.function.option_names())
                .map_err(|error| plan_datafusion_err!("{name}: {error}"))?,
        };
        let model = self.model(constants.first())?;
        self.function.check_options(&model, &options).map_err(|error| plan_datafusion_err!("{name}: {error}"))?;
        let return_type = self.function.return_type(&model).map_err(|error| plan_datafusion_err!("{name}: {error}"))?;
        Ok(ModelCall { function: self.function.clone(), model, options, return_type })
    }

    /// The model that a call names, or the only one that fits where it names none.
    fn model(&self, named: Option<&ScalarValue>) -> Result<Arc<SqlModel>> {
        let function = self.function.name();
        let models = self.models.list();
        match named {
            Some(value) => {
                let Some(Some(name)) = value.try_as_str() else {
                    return plan_err!("{function}: argument 2 (model) is {value}, but the name of a model is needed");
                };
                self.models.get(name).ok_or_else(|| {
                    let names = || models.iter().map(|model| model.name());
                    let hint = match nearest_name(name, names()) {
                        Some(nearest) => format!("did you mean '{nearest}'?"),
                        None if models.is_empty() => {
                            format!(
                                "there are none; add it with --model {name}=DIR or SET mistral.models.{name} = 'DIR'"
                            )
                        }
                        None => format!("there are {}", names().collect::<Vec<_>>().join(", ")),
                    };
                    plan_datafusion_err!("{function}: argument 2 (model): no model '{name}': {hint}")
                })
            }
            None => {
                let mut fitting = models.iter().filter(|model| self.function.return_type(model).is_ok());
                match (fitting.next(), fitting.next()) {
                    (Some(model), None) => Ok(model.clone()),
                    (Some(first), Some(second)) => plan_err!(
                        "{function}: argument 2 (model) is needed, since several models fit: '{}' and '{}' among them",
                        first.name(),
                        second.name()
                    ),
                    (None, _) => {
                        let why = models.first().and_then(|model| self.function.return_type(model).err());
                        match why.filter(|_| models.len() == 1) {
                            Some(error) => plan_err!("{function}: {error}"),
                            None => plan_err!(
                                "{function}: no model fits; add one with --model NAME=DIR or SET mistral.models.NAME = 'DIR'"
                            ),
                        }
                    }
                }
            }
        }
    }

    fn check_argument(&self, index: usize, data_type: &DataType) -> Result<()> {
        let name = self.function.name();
        let takes_options = !self.function.option_names().is_empty();
        let (what, wanted, fits) = match index {
            0 if self.function.accepts_chats() => {
                ("prompt", "text, or a list of {role, content}", is_text(data_type) || ChatTemplate::accepts(data_type))
            }
            0 => ("text", "text", is_text(data_type)),
            1 if takes_options => {
                ("model", "the name of a model", is_text(data_type) || matches!(data_type, DataType::Struct(_)))
            }
            1 => ("model", "the name of a model", is_text(data_type)),
            _ => ("options", "a struct", matches!(data_type, DataType::Struct(_))),
        };
        if !fits {
            return plan_err!("{name}: argument {} ({what}) has type {data_type}, but {wanted} is needed", index + 1);
        }
        if let DataType::Struct(fields) = data_type
            && index > 0
        {
            for field in fields {
                check_name(field.name(), self.function.option_names())
                    .map_err(|error| plan_datafusion_err!("{name}: argument {} ({what}): {error}", index + 1))?;
            }
        }
        Ok(())
    }
}

impl ScalarUDFImpl for ModelFunctionMarker {
    fn name(&self) -> &str {
        self.function.name()
    }

    fn aliases(&self) -> &[String] {
        &self.aliases
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        let most = self.signature.parameter_names.as_ref().map_or(3, Vec::len);
        if arg_types.is_empty() || arg_types.len() > most {
            return plan_err!(
                "{}: {} argument(s) were given, 1 to {most} are taken: {}",
                self.name(),
                arg_types.len(),
                self.signature.parameter_names.as_ref().map_or(String::new(), |names| names.join(", "))
            );
        }
        let coerce = |(index, data_type): (usize, &DataType)| match data_type {
            // NULL is a text like any other that is missing.
            DataType::Null if index == 0 => Ok(DataType::Utf8),
            other => self.check_argument(index, other).map(|()| other.clone()),
        };
        arg_types.iter().enumerate().map(coerce).collect()
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        plan_err!("{}: the result's type depends on the model", self.name())
    }

    fn return_field_from_args(&self, args: ReturnFieldArgs) -> Result<FieldRef> {
        for (index, field) in args.arg_fields.iter().enumerate() {
            if !(index == 0 && field.data_type() == &DataType::Null) {
                self.check_argument(index, field.data_type())?;
            }
        }
        // Options in the second place leave the model out.
        let names_model = args.arg_fields.get(1).is_some_and(|field| is_text(field.data_type()));
        let model = match (names_model, args.scalar_arguments.get(1)) {
            (true, Some(Some(name))) => self.model(Some(name))?,
            (true, _) => return plan_err!("{}: argument 2 (model) must be a text constant", self.name()),
            (false, _) => self.model(None)?,
        };
        let return_type =
            self.function.return_type(&model).map_err(|error| plan_datafusion_err!("{}: {error}", self.name()))?;
        Ok(Arc::new(Field::new(self.name(), return_type, true)))
    }

    fn invoke_with_args(&self, _: ScalarFunctionArgs) -> Result<ColumnarValue> {
        plan_err!(
            "{} cannot be used here: it is computed by queries of a session with mistral's functions",
            self.name()
        )
    }
}

impl PartialEq for ModelFunctionMarker {
    fn eq(&self, other: &Self) -> bool {
        self.function.name() == other.function.name() && Arc::ptr_eq(&self.models, &other.models)
    }
}

impl Eq for ModelFunctionMarker {}

impl Hash for ModelFunctionMarker {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.function.name().hash(state);
    }
}

/// The value of an expression without columns.
fn constant(expr: &Expr) -> Result<ScalarValue> {
    let schema = DFSchema::empty();
    let physical = create_physical_expr(expr, &schema, &ExecutionProps::new(), &PhysicalPlanningContext::default())?;
    let rows = arrow::array::RecordBatch::try_new_with_options(
        schema.inner().clone(),
        vec![],
        &arrow::array::RecordBatchOptions::new().with_row_count(Some(1)),
    )?;
    match physical.evaluate(&rows)? {
        ColumnarValue::Scalar(value) => Ok(value),
        ColumnarValue::Array(array) => ScalarValue::try_from_array(&array, 0),
    }
}
