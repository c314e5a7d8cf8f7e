//! How numbers are written in flags and job files.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

/// The schema of what [`count`] parses.
pub struct Count;

impl JsonSchema for Count {
    fn schema_name() -> Cow<'static, str> {
        "Count".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [
            { "type": "integer", "minimum": 1 },
            { "type": "string", "pattern": "^[0-9]+[kKmMgG]?$" },
        ]})
    }
}

/// Parses a count that may end in k, M or G: `16k` is 16,384.
///
/// Powers of two, because token and byte budgets are.
pub fn count(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.chars().last() {
        Some('k' | 'K') => (&text[..text.len() - 1], 10),
        Some('m' | 'M') => (&text[..text.len() - 1], 20),
        Some('g' | 'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| "expected a number such as 4096 or 16k".to_owned())?;
    let value = number.checked_mul(1 << shift).ok_or("the number is too large")?;
    if value == 0 { Err("must be at least 1".into()) } else { Ok(value) }
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn suffixes_are_powers_of_two() {
        assert_eq!(count("4096"), Ok(4096));
        assert_eq!(count("16k"), Ok(16_384));
        assert_eq!(count("2M"), Ok(2 << 20));
        for wrong in ["", "k", "1.5k", "-3", "0", "99999999999999999999", "9999999999999G", "é"] {
            assert!(count(wrong).is_err(), "{wrong}");
        }
    }
}
