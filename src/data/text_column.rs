//! One view of a text column, however Arrow stores it, without copying the text.

use arrow::array::{Array, ArrayRef, AsArray, LargeStringArray, StringArray, StringViewArray};
use arrow::datatypes::DataType;

/// A column of text: plain, large, view, or a dictionary of any of these.
#[derive(Debug, Clone)]
pub struct TextColumn<'a> {
    values: Values<'a>,
    /// For a dictionary, the value's place for each row; `None` where the key is null.
    keys: Option<Vec<Option<usize>>>,
}

#[derive(Debug, Clone, Copy)]
enum Values<'a> {
    Utf8(&'a StringArray),
    LargeUtf8(&'a LargeStringArray),
    Utf8View(&'a StringViewArray),
}

/// Whether a column of this type can be read with [`as_text`].
pub fn is_text(data_type: &DataType) -> bool {
    match data_type {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
        DataType::Dictionary(_, values) => {
            matches!(values.as_ref(), DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View)
        }
        _ => false,
    }
}

/// `array` as text, or `None` where its type is not a text type.
pub fn as_text(array: &ArrayRef) -> Option<TextColumn<'_>> {
    TextColumn::new(array.as_ref())
}

impl<'a> TextColumn<'a> {
    fn new(array: &'a dyn Array) -> Option<Self> {
        if let Some(dictionary) = array.as_any_dictionary_opt() {
            let values = Values::new(dictionary.values().as_ref())?;
            // Null keys are normalized to any value, and an empty dictionary has nothing to normalize to.
            let keys = match dictionary.values().len() {
                0 => vec![None; array.len()],
                _ => {
                    let keys = dictionary.normalized_keys().into_iter().enumerate();
                    keys.map(|(row, key)| array.is_valid(row).then_some(key)).collect()
                }
            };
            return Some(TextColumn { values, keys: Some(keys) });
        }
        Some(TextColumn { values: Values::new(array)?, keys: None })
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.keys.as_ref().map_or_else(|| self.values.len(), Vec::len)
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The text of `row`; `None` for a null and past the end.
    pub fn get(&self, row: usize) -> Option<&'a str> {
        match &self.keys {
            Some(keys) => self.values.get((*keys.get(row)?)?),
            None => self.values.get(row),
        }
    }

    /// The texts in the order of the rows, `None` for nulls.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Option<&'a str>> + '_ {
        (0..self.len()).map(|row| self.get(row))
    }
}

impl<'a> Values<'a> {
    fn new(array: &'a dyn Array) -> Option<Self> {
        match array.data_type() {
            DataType::Utf8 => Some(Values::Utf8(array.as_string())),
            DataType::LargeUtf8 => Some(Values::LargeUtf8(array.as_string())),
            DataType::Utf8View => Some(Values::Utf8View(array.as_string_view())),
            _ => None,
        }
    }

    fn len(&self) -> usize {
        match self {
            Values::Utf8(array) => array.len(),
            Values::LargeUtf8(array) => array.len(),
            Values::Utf8View(array) => array.len(),
        }
    }

    fn get(&self, row: usize) -> Option<&'a str> {
        match *self {
            Values::Utf8(array) => (row < array.len() && array.is_valid(row)).then(|| array.value(row)),
            Values::LargeUtf8(array) => (row < array.len() && array.is_valid(row)).then(|| array.value(row)),
            Values::Utf8View(array) => (row < array.len() && array.is_valid(row)).then(|| array.value(row)),
        }
    }
}

/// The bytes of text and binary values in the rows of `array`, nested ones included.
///
/// A function of the rows alone, not of the buffers behind them: the same rows count the same
/// wherever a decoder happened to cut its batches.
pub(crate) fn payload_bytes(array: &dyn Array) -> usize {
    fn ends<O: TryInto<usize> + Copy>(offsets: &[O]) -> (usize, usize) {
        let at = |offset: Option<&O>| offset.and_then(|&offset| offset.try_into().ok()).unwrap_or(0);
        (at(offsets.first()), at(offsets.last()))
    }
    fn spread<O: TryInto<usize> + Copy>(offsets: &[O]) -> usize {
        let (start, end) = ends(offsets);
        end - start
    }
    fn child(values: &ArrayRef, start: usize, end: usize) -> usize {
        payload_bytes(values.slice(start, end - start).as_ref())
    }
    match array.data_type() {
        DataType::Utf8 => spread(array.as_string::<i32>().value_offsets()),
        DataType::LargeUtf8 => spread(array.as_string::<i64>().value_offsets()),
        DataType::Binary => spread(array.as_binary::<i32>().value_offsets()),
        DataType::LargeBinary => spread(array.as_binary::<i64>().value_offsets()),
        DataType::BinaryView => array.as_binary_view().iter().flatten().map(<[u8]>::len).sum(),
        DataType::Utf8View | DataType::Dictionary(..) => {
            TextColumn::new(array).map_or(0, |texts| texts.iter().flatten().map(str::len).sum())
        }
        DataType::List(_) => {
            let (start, end) = ends(array.as_list::<i32>().value_offsets());
            child(array.as_list::<i32>().values(), start, end)
        }
        DataType::LargeList(_) => {
            let (start, end) = ends(array.as_list::<i64>().value_offsets());
            child(array.as_list::<i64>().values(), start, end)
        }
        DataType::FixedSizeList(..) => payload_bytes(array.as_fixed_size_list().values().as_ref()),
        DataType::Map(..) => {
            let map = array.as_map();
            let (start, end) = ends(map.value_offsets());
            map.entries().columns().iter().map(|column| child(column, start, end)).sum()
        }
        DataType::Struct(_) => array.as_struct().columns().iter().map(|column| payload_bytes(column.as_ref())).sum(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{DictionaryArray, Int8Array, Int32Array, ListArray};
    use arrow::datatypes::{Int8Type, Int32Type};

    use super::*;

    fn texts(array: &ArrayRef) -> Vec<Option<&str>> {
        as_text(array).unwrap().iter().collect()
    }

    #[test]
    fn every_text_type_reads_the_same() {
        let rows = vec![Some("a"), None, Some(""), Some("a text that is longer than a view holds inline")];
        let dictionary: DictionaryArray<Int32Type> = rows.iter().copied().collect();
        let large_values = DictionaryArray::<Int8Type>::new(
            Int8Array::from(vec![Some(1), None, Some(2), Some(0)]),
            Arc::new(LargeStringArray::from(vec![rows[3], rows[0], rows[2]])),
        );
        let arrays: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from(rows.clone())),
            Arc::new(LargeStringArray::from(rows.clone())),
            Arc::new(StringViewArray::from(rows.clone())),
            Arc::new(dictionary),
            Arc::new(large_values),
        ];
        for array in &arrays {
            assert!(is_text(array.data_type()));
            assert_eq!(texts(array), rows, "{}", array.data_type());
            assert_eq!(texts(&array.slice(1, 3)), rows[1..], "{}", array.data_type());
            assert_eq!(payload_bytes(array), 1 + rows[3].unwrap().len(), "{}", array.data_type());
            assert_eq!(payload_bytes(&array.slice(0, 3)), 1, "{}", array.data_type());
            assert_eq!(as_text(array).unwrap().get(99), None);
        }
    }

    #[test]
    fn a_dictionary_may_hold_null_values_or_none_at_all() {
        let null_value = DictionaryArray::<Int8Type>::new(
            Int8Array::from(vec![0, 1]),
            Arc::new(StringArray::from(vec![Some("a"), None])),
        );
        let array: ArrayRef = Arc::new(null_value);
        assert_eq!(texts(&array), [Some("a"), None]);
        let no_values = DictionaryArray::<Int8Type>::new(
            Int8Array::from(vec![None, None]),
            Arc::new(StringArray::from(Vec::<&str>::new())),
        );
        let array: ArrayRef = Arc::new(no_values);
        assert_eq!(texts(&array), [None, None]);
    }

    #[test]
    fn numbers_are_not_text() {
        let array: ArrayRef = Arc::new(Int32Array::from(vec![1]));
        assert!(as_text(&array).is_none());
        assert!(!is_text(array.data_type()));
        assert_eq!(payload_bytes(&array), 0);
    }

    #[test]
    fn nested_text_counts_by_rows() {
        let mut builder = arrow::array::ListBuilder::new(arrow::array::StringBuilder::new());
        builder.append_value([Some("ab"), Some("cde")]);
        builder.append_null();
        builder.append_value([Some("f")]);
        let list: ListArray = builder.finish();
        assert_eq!(payload_bytes(&list), 6);
        assert_eq!(payload_bytes(&list.slice(1, 2)), 1);
    }
}
