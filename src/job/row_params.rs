//! Settings of generation that rows bring themselves: the struct column of `--params-column`.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Float64Array, Int64Array, RecordBatch, UInt64Array};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type, Int64Type, UInt64Type};

use crate::data::dataset::Dataset;
use crate::data::text_column::{as_text, is_text};
use crate::error::{Error, Result, nearest_name};
use crate::generation::{BadSetting, SamplingParams};

const FLAG: &str = "--params-column";

/// A struct column whose fields override the job's settings, row by row; a null field, or row, overrides nothing.
#[derive(Debug)]
pub struct RowParams {
    column: String,
    /// The fields that the column has.
    settings: Vec<Setting>,
    defaults: Arc<SamplingParams>,
    /// What ends completions where a row's `ignore_eos` is false although the job's is true.
    eos_token_ids: Vec<u32>,
}

/// A setting that a row may bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Setting {
    name: &'static str,
    kind: Kind,
}

/// The types that a setting's values may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Integer,
    Number,
    Boolean,
    /// A text or a list of texts.
    Texts,
    Integers,
}

const SETTINGS: [Setting; 14] = {
    const fn setting(name: &'static str, kind: Kind) -> Setting {
        Setting { name, kind }
    }
    [
        setting("max_tokens", Kind::Integer),
        setting("min_tokens", Kind::Integer),
        setting("temperature", Kind::Number),
        setting("top_k", Kind::Integer),
        setting("top_p", Kind::Number),
        setting("min_p", Kind::Number),
        setting("repetition_penalty", Kind::Number),
        setting("frequency_penalty", Kind::Number),
        setting("presence_penalty", Kind::Number),
        setting("no_repeat_ngram_size", Kind::Integer),
        setting("stop", Kind::Texts),
        setting("stop_token_ids", Kind::Integers),
        setting("ignore_eos", Kind::Boolean),
        setting("seed", Kind::Integer),
    ]
};

impl Kind {
    fn accepts(self, found: &DataType) -> bool {
        let list_of = |accepts: fn(&DataType) -> bool| match found {
            DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => {
                accepts(item.data_type()) || item.data_type().is_null()
            }
            _ => false,
        };
        found.is_null()
            || match self {
                Self::Integer => found.is_integer(),
                Self::Number => found.is_integer() || found.is_floating(),
                Self::Boolean => *found == DataType::Boolean,
                Self::Texts => is_text(found) || list_of(is_text),
                Self::Integers => list_of(DataType::is_integer),
            }
    }

    fn expected(self) -> &'static str {
        match self {
            Self::Integer => "an integer",
            Self::Number => "a number",
            Self::Boolean => "a boolean",
            Self::Texts => "a text or a list of texts",
            Self::Integers => "a list of integers",
        }
    }
}

/// One field's values in the rows of a window.
enum Values {
    Null,
    Integers(Int64Array),
    Unsigned(UInt64Array),
    Numbers(Float64Array),
    Booleans(BooleanArray),
    Texts(ArrayRef),
    Lists(Kind, ArrayRef),
}

/// One value of a field.
enum Value {
    Integer(i128),
    Number(f64),
    Boolean(bool),
    Texts(Vec<String>),
    Integers(Vec<i128>),
}

impl RowParams {
    /// Checks that the column is a struct of settings.
    ///
    /// # Errors
    /// [`Error::ColumnMissing`]; [`Error::Usage`] for a field that is no setting, with the nearest, or one of a wrong type.
    pub fn new(
        dataset: &Dataset,
        column: &str,
        defaults: Arc<SamplingParams>,
        eos_token_ids: Vec<u32>,
    ) -> Result<Self> {
        let names = || SETTINGS.iter().map(|setting| setting.name);
        let found = dataset.column(column, FLAG)?.data_type();
        let DataType::Struct(fields) = found else {
            return Err(Error::Usage(format!(
                "{FLAG}: column '{column}' has type {found}, but a struct is needed, with fields such as temperature"
            )));
        };
        let mut settings = Vec::with_capacity(fields.len());
        for field in fields {
            let Some(setting) = SETTINGS.iter().find(|setting| setting.name == field.name()) else {
                let hint = nearest_name(field.name(), names()).map(|name| format!("did you mean '{name}'?"));
                let hint = hint.unwrap_or_else(|| format!("it can be {}", names().collect::<Vec<_>>().join(", ")));
                return Err(Error::Usage(format!(
                    "{FLAG}: field '{}' of column '{column}' is no setting of a row: {hint}",
                    field.name()
                )));
            };
            if !setting.kind.accepts(field.data_type()) {
                return Err(Error::Usage(format!(
                    "{FLAG}: field '{}' of column '{column}' has type {}, but {} is needed",
                    field.name(),
                    field.data_type(),
                    setting.kind.expected()
                )));
            }
            settings.push(*setting);
        }
        Ok(Self { column: column.to_owned(), settings, defaults, eos_token_ids })
    }

    /// The input column.
    pub fn column(&self) -> &str {
        &self.column
    }

    /// Each row's settings, or a message for its `error` column.
    ///
    /// # Errors
    /// [`Error::Internal`] when the column was not read, or is of another type than planned.
    pub fn rows(&self, batch: &RecordBatch) -> Result<Vec<Result<Arc<SamplingParams>, String>>> {
        let column = batch.column_by_name(&self.column).and_then(|column| column.as_struct_opt());
        let internal = || Error::Internal(format!("column '{}' was not read as a struct", self.column));
        let column = column.ok_or_else(internal)?;
        let mut fields = Vec::with_capacity(self.settings.len());
        for setting in &self.settings {
            let values = column.column_by_name(setting.name).ok_or_else(internal)?;
            fields.push((setting.name, Values::new(setting.kind, values)?));
        }
        let row = |row: usize| {
            if column.is_null(row) {
                return Ok(self.defaults.clone());
            }
            self.row(&fields, row).map_err(|bad| format!("{}.{bad}", self.column))
        };
        Ok((0..batch.num_rows()).map(row).collect())
    }

    fn row(&self, fields: &[(&'static str, Values)], row: usize) -> Result<Arc<SamplingParams>, BadSetting> {
        let mut own: Option<SamplingParams> = None;
        let mut ignore_eos = None;
        let mut stop_token_ids = false;
        for (name, values) in fields {
            let Some(value) = values.get(row).map_err(|problem| BadSetting { name, problem })? else { continue };
            let params = own.get_or_insert_with(|| (*self.defaults).clone());
            match (*name, value) {
                ("max_tokens", Value::Integer(value)) => params.max_tokens = fit(name, value)?,
                ("min_tokens", Value::Integer(value)) => params.min_tokens = fit(name, value)?,
                ("temperature", Value::Number(value)) => params.temperature = value as f32,
                ("top_k", Value::Integer(value)) => params.top_k = Some(fit(name, value)?),
                ("top_p", Value::Number(value)) => params.top_p = value as f32,
                ("min_p", Value::Number(value)) => params.min_p = value as f32,
                ("repetition_penalty", Value::Number(value)) => params.repetition_penalty = value as f32,
                ("frequency_penalty", Value::Number(value)) => params.frequency_penalty = value as f32,
                ("presence_penalty", Value::Number(value)) => params.presence_penalty = value as f32,
                ("no_repeat_ngram_size", Value::Integer(value)) => params.no_repeat_ngram_size = fit(name, value)?,
                ("stop", Value::Texts(texts)) => params.stop = texts,
                ("stop_token_ids", Value::Integers(ids)) => {
                    params.stop_token_ids = ids.into_iter().map(|id| fit(name, id)).collect::<Result<_, _>>()?;
                    stop_token_ids = true;
                }
                ("ignore_eos", Value::Boolean(value)) => ignore_eos = Some(value),
                ("seed", Value::Integer(value)) => params.seed = fit(name, value)?,
                (name, _) => return Err(BadSetting { name, problem: "has a value of another type".into() }),
            }
        }
        let Some(mut params) = own else { return Ok(self.defaults.clone()) };
        match ignore_eos {
            Some(true) if stop_token_ids && !params.stop_token_ids.is_empty() => {
                return Err(BadSetting { name: "ignore_eos", problem: "contradicts stop_token_ids".into() });
            }
            Some(true) => params.stop_token_ids.clear(),
            Some(false) if params.stop_token_ids.is_empty() && !stop_token_ids => {
                params.stop_token_ids.clone_from(&self.eos_token_ids);
            }
            _ => {}
        }
        params.check()?;
        Ok(Arc::new(params))
    }
}

/// An integer as the type of its setting.
fn fit<T: TryFrom<i128>>(name: &'static str, value: i128) -> Result<T, BadSetting> {
    T::try_from(value).map_err(|_| {
        let wanted = if value < 0 { "0 or more" } else { "smaller" };
        BadSetting { name, problem: format!("is {value}; it has to be {wanted}") }
    })
}

impl Values {
    fn new(kind: Kind, values: &ArrayRef) -> Result<Self> {
        let found = values.data_type();
        Ok(match kind {
            _ if found.is_null() => Self::Null,
            Kind::Integer => integers(values)?,
            Kind::Number => Self::Numbers(cast(values, &DataType::Float64)?.as_primitive::<Float64Type>().clone()),
            Kind::Boolean => Self::Booleans(values.as_boolean().clone()),
            Kind::Texts if is_text(found) => Self::Texts(values.clone()),
            Kind::Texts | Kind::Integers => Self::Lists(kind, values.clone()),
        })
    }

    /// The value of `row`, `None` where it is null; the message is about a list's value.
    fn get(&self, row: usize) -> Result<Option<Value>, String> {
        Ok(match self {
            Self::Null => None,
            Self::Integers(values) => values.is_valid(row).then(|| Value::Integer(values.value(row).into())),
            Self::Unsigned(values) => values.is_valid(row).then(|| Value::Integer(values.value(row).into())),
            Self::Numbers(values) => values.is_valid(row).then(|| Value::Number(values.value(row))),
            Self::Booleans(values) => values.is_valid(row).then(|| Value::Boolean(values.value(row))),
            Self::Texts(values) => {
                as_text(values).and_then(|texts| Some(Value::Texts(vec![texts.get(row)?.to_owned()])))
            }
            Self::Lists(_, values) if values.is_null(row) => None,
            Self::Lists(kind, values) => Some(list(*kind, &item(values, row).ok_or("is not a list")?)?),
        })
    }
}

fn integers(values: &ArrayRef) -> Result<Values> {
    Ok(match values.data_type() {
        DataType::UInt64 => Values::Unsigned(values.as_primitive::<UInt64Type>().clone()),
        _ => Values::Integers(cast(values, &DataType::Int64)?.as_primitive::<Int64Type>().clone()),
    })
}

/// The values of a list in `row`.
fn item(lists: &ArrayRef, row: usize) -> Option<ArrayRef> {
    match lists.data_type() {
        DataType::List(_) => Some(lists.as_list::<i32>().value(row)),
        DataType::LargeList(_) => Some(lists.as_list::<i64>().value(row)),
        DataType::FixedSizeList(..) => Some(lists.as_fixed_size_list().value(row)),
        _ => None,
    }
}

fn list(kind: Kind, values: &ArrayRef) -> Result<Value, String> {
    if values.logical_null_count() > 0 {
        return Err("holds a null".into());
    }
    if kind == Kind::Texts {
        let texts = as_text(values).map(|texts| texts.iter().flatten().map(str::to_owned).collect());
        return Ok(Value::Texts(texts.unwrap_or_default()));
    }
    if values.is_empty() {
        return Ok(Value::Integers(Vec::new()));
    }
    match integers(values).map_err(|error| error.to_string())? {
        Values::Integers(values) => Ok(Value::Integers(values.values().iter().map(|&id| id.into()).collect())),
        Values::Unsigned(values) => Ok(Value::Integers(values.values().iter().map(|&id| id.into()).collect())),
        _ => Err("is not a list of integers".into()),
    }
}
