//! `{max_tokens: 8, stop: ['.']}`: the options of a call, which are constants.

use std::collections::BTreeMap;
use std::fmt;

use arrow::array::{Array, AsArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float32Type, UInt64Type};
use datafusion::common::ScalarValue;

use crate::data::text_column::as_text;
use crate::error::{Error, Result, nearest_name};

/// Options by name; a null is as good as none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct CallOptions(BTreeMap<String, ScalarValue>);

impl CallOptions {
    /// The fields of a struct value.
    ///
    /// # Errors
    /// [`Error::Usage`] when it is none, or names an option that is not among `known`.
    pub fn from_struct(value: &ScalarValue, known: &[&str]) -> Result<Self> {
        let ScalarValue::Struct(fields) = value else {
            return Err(Error::Usage(format!("options have type {}, but a struct is needed", value.data_type())));
        };
        let mut options = BTreeMap::new();
        for (name, values) in fields.column_names().into_iter().zip(fields.columns()) {
            check_name(name, known)?;
            let value = ScalarValue::try_from_array(values, 0)
                .map_err(|error| Error::Usage(format!("option {name}: {error}")))?;
            if !value.is_null() {
                options.insert(name.to_owned(), value);
            }
        }
        Ok(Self(options))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A whole number from 0 on.
    ///
    /// # Errors
    /// [`Error::Usage`] when the value is none.
    pub fn count(&self, name: &str) -> Result<Option<u64>> {
        self.get(name, &DataType::UInt64, DataType::is_integer, "a whole number from 0 on", |array| {
            array.as_primitive::<UInt64Type>().value(0)
        })
    }

    /// A number.
    ///
    /// # Errors
    /// [`Error::Usage`] when the value is none.
    pub fn number(&self, name: &str) -> Result<Option<f32>> {
        self.get(name, &DataType::Float32, DataType::is_numeric, "a number", |array| {
            array.as_primitive::<Float32Type>().value(0)
        })
    }

    /// Yes or no.
    ///
    /// # Errors
    /// [`Error::Usage`] when the value is neither.
    pub fn flag(&self, name: &str) -> Result<Option<bool>> {
        let is_boolean = |data_type: &DataType| *data_type == DataType::Boolean;
        self.get(name, &DataType::Boolean, is_boolean, "true or false", |array| array.as_boolean().value(0))
    }

    /// A text.
    ///
    /// # Errors
    /// [`Error::Usage`] when the value is none.
    pub fn text(&self, name: &str) -> Result<Option<String>> {
        self.get(name, &DataType::Utf8, DataType::is_string, "a text", |array| {
            array.as_string::<i32>().value(0).to_owned()
        })
    }

    /// A text, or a list of texts.
    ///
    /// # Errors
    /// [`Error::Usage`] when the value is neither.
    pub fn texts(&self, name: &str) -> Result<Option<Vec<String>>> {
        let Some(ScalarValue::List(list)) = self.0.get(name) else {
            return Ok(self.text(name)?.map(|text| vec![text]));
        };
        let values = list.value(0);
        match as_text(&values) {
            Some(texts) => Ok(Some(texts.iter().flatten().map(str::to_owned).collect())),
            None if values.is_empty() => Ok(Some(Vec::new())),
            None => Err(wrong(name, &self.0[name], "a text or a list of texts")),
        }
    }

    fn get<T>(
        &self,
        name: &str,
        wanted: &DataType,
        fits: impl Fn(&DataType) -> bool,
        what: &str,
        value: impl Fn(&dyn Array) -> T,
    ) -> Result<Option<T>> {
        let Some(scalar) = self.0.get(name) else { return Ok(None) };
        let cast = fits(&scalar.data_type())
            .then(|| scalar.to_array().ok().and_then(|array| cast(&array, wanted).ok()))
            .flatten()
            .filter(|array| array.is_valid(0));
        cast.map(|array| value(&array)).map(Some).ok_or_else(|| wrong(name, scalar, what))
    }
}

/// Refuses an option that is not among `known`.
///
/// # Errors
/// [`Error::Usage`] naming the nearest.
pub fn check_name(name: &str, known: &[&str]) -> Result<()> {
    if known.contains(&name) {
        return Ok(());
    }
    let nearest = nearest_name(name, known.iter().copied()).map(|nearest| format!("did you mean {nearest}?"));
    let hint = nearest.unwrap_or_else(|| format!("there are {}", known.join(", ")));
    Err(Error::Usage(format!("no option {name}: {hint}")))
}

fn wrong(name: &str, value: &ScalarValue, what: &str) -> Error {
    Error::Usage(format!("option {name} is {value}; it has to be {what}"))
}

impl fmt::Display for CallOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        let options: Vec<String> = self.0.iter().map(|(name, value)| format!("{name}: {value}")).collect();
        write!(f, "{{{}}}", options.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::datatypes::Field;
    use datafusion::common::scalar::ScalarStructBuilder;

    fn options(fields: Vec<(&str, ScalarValue)>) -> CallOptions {
        let known = ["count", "number", "flag", "text"];
        let builder = fields.into_iter().fold(ScalarStructBuilder::new(), |builder, (name, value)| {
            builder.with_scalar(Field::new(name, value.data_type(), true), value)
        });
        CallOptions::from_struct(&builder.build().unwrap(), &known).unwrap()
    }

    #[test]
    fn values_have_the_types_that_are_asked_for() {
        let texts = ScalarValue::List(ScalarValue::new_list_nullable(&["a".into(), "b".into()], &DataType::Utf8));
        let options = options(vec![
            ("count", ScalarValue::Int64(Some(8))),
            ("number", ScalarValue::Float64(Some(0.5))),
            ("flag", ScalarValue::Boolean(None)),
            ("text", texts),
        ]);
        assert_eq!(options.count("count").unwrap(), Some(8));
        assert_eq!(options.number("count").unwrap(), Some(8.0));
        assert_eq!(options.number("number").unwrap(), Some(0.5));
        assert_eq!(options.flag("flag").unwrap(), None, "a null is none");
        assert_eq!(options.texts("text").unwrap(), Some(vec!["a".into(), "b".into()]));
        for failed in [options.count("number").err(), options.text("count").err(), options.flag("count").err()] {
            assert!(failed.unwrap().to_string().contains("it has to be"));
        }
        let negative = self::options(vec![("count", ScalarValue::Int64(Some(-1)))]);
        assert!(negative.count("count").unwrap_err().to_string().contains("option count is -1"));
    }

    #[test]
    fn an_unknown_option_names_the_nearest() {
        let message = check_name("max_token", &["max_tokens", "seed"]).unwrap_err().to_string();
        assert_eq!(message, "no option max_token: did you mean max_tokens?");
        let no_struct = CallOptions::from_struct(&ScalarValue::from(3), &[]).unwrap_err();
        assert!(no_struct.to_string().contains("a struct is needed"));
    }
}
