//! Whether two files' columns are the same, and how one file's columns become the dataset's.
//!
//! Types must be equal; only what carries no data may differ: nested nullability (the dataset's is the
//! wider one), the name of a list's items (Parquet writers disagree on it) and field metadata.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Field, FieldRef};
use arrow::error::ArrowError;

/// The type that holds both, or `None` where the files disagree.
pub(crate) fn merge_types(first: &DataType, second: &DataType) -> Option<DataType> {
    if first == second {
        return Some(first.clone());
    }
    let items = |a: &FieldRef, b: &FieldRef| Some(Arc::new(merge_fields(a, b)?));
    match (first, second) {
        (DataType::List(a), DataType::List(b)) => Some(DataType::List(items(a, b)?)),
        (DataType::LargeList(a), DataType::LargeList(b)) => Some(DataType::LargeList(items(a, b)?)),
        (DataType::FixedSizeList(a, n), DataType::FixedSizeList(b, m)) if n == m => {
            Some(DataType::FixedSizeList(items(a, b)?, *n))
        }
        (DataType::Struct(a), DataType::Struct(b)) if a.len() == b.len() => a
            .iter()
            .zip(b)
            .map(|(a, b)| if a.name() == b.name() { merge_fields(a, b) } else { None })
            .collect::<Option<Vec<Field>>>()
            .map(|fields| DataType::Struct(fields.into())),
        _ => None,
    }
}

/// `first` with the wider type and nullability of the two; `None` where the types disagree.
pub(crate) fn merge_fields(first: &Field, second: &Field) -> Option<Field> {
    let data_type = merge_types(first.data_type(), second.data_type())?;
    Some(first.clone().with_data_type(data_type).with_nullable(first.is_nullable() || second.is_nullable()))
}

/// `array` in exactly the type `wanted`, which [`merge_types`] made from its own.
///
/// # Errors
///
/// Where the types do not belong together.
pub(crate) fn conform(array: &ArrayRef, wanted: &DataType) -> Result<ArrayRef, ArrowError> {
    if array.data_type() == wanted {
        return Ok(Arc::clone(array));
    }
    if merge_types(array.data_type(), wanted).is_none() {
        return Err(ArrowError::SchemaError(format!("a column is {}, not {wanted}", array.data_type())));
    }
    cast_with_options(array, wanted, &CastOptions { safe: false, ..CastOptions::default() })
}

#[cfg(test)]
mod tests {
    use arrow::array::{AsArray, Int32Array, ListArray, StructArray};
    use arrow::datatypes::Int32Type;

    use super::*;

    fn list(name: &str, nullable: bool) -> DataType {
        DataType::List(Arc::new(Field::new(name, DataType::Int32, nullable)))
    }

    #[test]
    fn only_what_carries_no_data_may_differ() {
        assert_eq!(merge_types(&list("item", false), &list("element", true)), Some(list("item", true)));
        assert_eq!(merge_types(&DataType::Int32, &DataType::Int64), None);
        let fields = |a: &str, b: &str| DataType::Struct(vec![Field::new(a, list(b, true), true)].into());
        assert_eq!(merge_types(&fields("a", "item"), &fields("a", "x")), Some(fields("a", "item")));
        assert_eq!(merge_types(&fields("a", "item"), &fields("b", "item")), None);
    }

    #[test]
    fn columns_conform_without_losing_values() {
        let rows = || vec![Some(vec![Some(1), Some(2)]), None, Some(vec![])];
        let array = ListArray::from_iter_primitive::<Int32Type, _, _>(rows());
        let array = StructArray::from(vec![(
            Arc::new(Field::new("a", array.data_type().clone(), true)),
            Arc::new(array) as ArrayRef,
        )]);
        let wanted = DataType::Struct(vec![Field::new("a", list("element", true), true)].into());
        let conformed = conform(&(Arc::new(array) as ArrayRef), &wanted).unwrap();
        assert_eq!(conformed.data_type(), &wanted);
        let inner = conformed.as_struct().column(0).as_list::<i32>();
        assert_eq!(inner.value(0).as_primitive::<Int32Type>(), &Int32Array::from(vec![1, 2]));
        assert!(inner.is_null(1) && inner.is_valid(2));
        assert!(conform(&conformed, &DataType::Int32).is_err());
    }
}
