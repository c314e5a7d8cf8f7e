//! `${name}` and `${name:-default}` in the strings of a job file.
//!
//! Values come from `--set` and else from the environment, never from a clock: the same file with the same variables is
//! the same job.

use std::collections::BTreeMap;

/// The values of variables.
#[derive(Debug, Clone, Default)]
pub struct Variables {
    set: BTreeMap<String, String>,
    environment: BTreeMap<String, String>,
}

impl Variables {
    /// Variables from `set`, and the process's environment for those that it lacks.
    pub fn new(set: BTreeMap<String, String>) -> Self {
        // A value that is not UTF-8 cannot stand in a TOML string: it counts as undefined.
        let text = |value: std::ffi::OsString| value.into_string().ok();
        let environment = std::env::vars_os().filter_map(|(name, value)| Some((text(name)?, text(value)?))).collect();
        Self { set, environment }
    }

    /// The variables that were set by hand.
    pub fn set_names(&self) -> impl Iterator<Item = &str> {
        self.set.keys().map(String::as_str)
    }

    /// Replaces every variable of `text`; `used` collects their names. `$${` stands for a literal `${`.
    ///
    /// As in a shell, `:-` also replaces an empty value.
    ///
    /// # Errors
    /// A message naming the variable that is not defined and has no default, or what is wrong with the syntax.
    pub fn expand(&self, text: &str, used: &mut Vec<String>) -> Result<String, String> {
        let mut expanded = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(start) = rest.find("${") {
            if let Some(before) = rest[..start].strip_suffix('$') {
                expanded.push_str(before);
                expanded.push_str("${");
                rest = &rest[start + 2..];
                continue;
            }
            expanded.push_str(&rest[..start]);
            let inside = &rest[start + 2..];
            let end = inside.find('}').ok_or("a ${ without its }; write $${ for a literal ${")?;
            let (name, default) = match inside[..end].split_once(":-") {
                Some((name, default)) => (name, Some(default)),
                None => (&inside[..end], None),
            };
            if !is_name(name) {
                return Err(format!("'${{{}}}' is no variable; write $${{ for a literal ${{", &inside[..end]));
            }
            used.push(name.to_owned());
            let value = self.set.get(name).or_else(|| self.environment.get(name)).map(String::as_str);
            let value = match default {
                Some(default) => value.filter(|value| !value.is_empty()).unwrap_or(default),
                None => value.ok_or_else(|| {
                    format!("variable '{name}' is not defined; give --set {name}=VALUE or set it in the environment")
                })?,
            };
            expanded.push_str(value);
            rest = &inside[end + 1..];
        }
        expanded.push_str(rest);
        Ok(expanded)
    }
}

fn is_name(name: &str) -> bool {
    !name.starts_with(|c: char| c.is_ascii_digit())
        && !name.is_empty()
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables() -> Variables {
        let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect();
        Variables {
            set: map(&[("date", "2026-07-01"), ("lang", "en")]),
            environment: map(&[("lang", "de"), ("HOME", "/home/x"), ("empty", "")]),
        }
    }

    #[test]
    fn what_is_set_wins_over_the_environment_and_both_over_the_default() {
        let expand = |text: &str| variables().expand(text, &mut Vec::new()).unwrap();
        assert_eq!(expand("out/${date}/${lang}"), "out/2026-07-01/en");
        assert_eq!(expand("${HOME}/${date:-none}${none:-a b}"), "/home/x/2026-07-01a b");
        assert_eq!(expand("${empty}|${empty:-x}|${none:-}"), "|x|");
        assert_eq!(expand("$${date} costs $5 and {text}"), "${date} costs $5 and {text}");
        assert_eq!(expand("${none:-${}"), "${", "a default ends at the first brace");
    }

    #[test]
    fn what_is_not_defined_is_named() {
        let refuse = |text: &str| variables().expand(text, &mut Vec::new()).unwrap_err();
        assert!(refuse("a ${nowhere}").contains("'nowhere'"));
        assert!(refuse("${date").contains("without its }"));
        assert!(refuse("${}").contains("'${}'"));
        assert!(refuse("${1a}").contains("'${1a}'"));
        let mut used = Vec::new();
        variables().expand("${date}${lang:-x}", &mut used).unwrap();
        assert_eq!(used, ["date", "lang"]);
    }
}
