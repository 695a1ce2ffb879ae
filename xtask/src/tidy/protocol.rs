//! Field numbers of the protocol: once used, never used for anything else.
//!
//! A committed list holds every number that was ever given out. A change or a removal of one
//! breaks agents in the field, so the list only grows; `cargo xtask codegen` appends to it.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Next to the protocol itself.
const LOCK: &str = "mesh-api/proto/numbers.lock";
const PROTO: &str = "mesh-api/proto/mesh/v1";
const HEADER: &str = "# Numbers of the protocol, given out for ever: `cargo xtask codegen` appends, nobody removes.\n";

/// `Message.number` to what it means: name and type.
type Numbers = BTreeMap<String, String>;

pub(crate) fn findings(root: &Path) -> Result<Vec<String>> {
    let given = read_lock(root)?;
    let now = read_protocol(root)?;
    let mut findings = broken_promises(&given, &now);
    let mut new = now.keys().filter(|number| !given.contains_key(*number));
    if let Some(first) = new.next() {
        let more = new.count();
        findings.push(format!(
            "{LOCK}: lacks {first} and {more} more: run `cargo xtask codegen`"
        ));
    }
    Ok(findings)
}

/// Appends the numbers that are new, if no old one has changed.
pub(crate) fn extend_lock(root: &Path) -> Result<()> {
    let given = read_lock(root)?;
    let now = read_protocol(root)?;
    let broken = broken_promises(&given, &now);
    if !broken.is_empty() {
        bail!("{}", broken.join("\n"));
    }
    let mut text = HEADER.to_owned();
    for (number, meaning) in given.iter().chain(&now).collect::<BTreeMap<_, _>>() {
        text.push_str(&format!("{number} {meaning}\n"));
    }
    std::fs::write(root.join(LOCK), text).with_context(|| format!("write {LOCK}"))
}

fn broken_promises(given: &Numbers, now: &Numbers) -> Vec<String> {
    given
        .iter()
        .filter_map(|(number, meaning)| match now.get(number) {
            Some(new) if new == meaning || new == "reserved" => None,
            Some(new) => Some(format!(
                "{PROTO}: {number} meant `{meaning}` and means `{new}` now: give the new field a new number"
            )),
            None => Some(format!(
                "{PROTO}: {number} (`{meaning}`) is gone: leave `reserved {};` in its place",
                number.rsplit('.').next().unwrap_or(number)
            )),
        })
        .collect()
}

fn read_lock(root: &Path) -> Result<Numbers> {
    let path = root.join(LOCK);
    if !path.exists() {
        return Ok(Numbers::new());
    }
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {LOCK}"))?;
    Ok(text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once(' '))
        .map(|(number, meaning)| (number.to_owned(), meaning.to_owned()))
        .collect())
}

fn read_protocol(root: &Path) -> Result<Numbers> {
    let mut numbers = Numbers::new();
    let folder = std::fs::read_dir(root.join(PROTO)).with_context(|| format!("list {PROTO}"))?;
    for entry in folder {
        let path = entry.with_context(|| format!("list {PROTO}"))?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "proto")
        {
            let text = std::fs::read_to_string(&path)
                .with_context(|| format!("read {}", path.display()))?;
            numbers_in(&text, &mut numbers);
        }
    }
    Ok(numbers)
}

/// Reads the plain style that our files are written in: one field a line, names before braces.
fn numbers_in(text: &str, numbers: &mut Numbers) {
    let mut scope: Vec<String> = Vec::new();
    for line in text.lines() {
        let code = line.split("//").next().unwrap_or_default().trim();
        let words: Vec<_> = code.split_whitespace().collect();
        match words.as_slice() {
            // A oneof does not name its fields' space, nor do braces of any other kind.
            ["message" | "enum", name, ..] if code.contains('{') => {
                scope.push((*name).trim_end_matches("{}").to_owned());
            }
            _ if code.ends_with('{') => scope.push(String::new()),
            ["reserved", list @ ..] => {
                for number in list.join(" ").trim_end_matches(';').split(',') {
                    if number.trim().parse::<u32>().is_ok() {
                        numbers.insert(key(&scope, number.trim()), "reserved".to_owned());
                    }
                }
            }
            _ => {
                if let Some((field, number)) = code.trim_end_matches(';').split_once(" = ")
                    && number.parse::<i32>().is_ok()
                    && !scope.is_empty()
                {
                    numbers.insert(key(&scope, number), field.to_owned());
                }
            }
        }
        if code.ends_with('}') {
            scope.pop();
        }
    }
}

fn key(scope: &[String], number: &str) -> String {
    let mut parts: Vec<_> = scope
        .iter()
        .map(String::as_str)
        .filter(|s| !s.is_empty())
        .collect();
    parts.push(number);
    parts.join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "syntax = \"proto3\";\nmessage Empty {}\nmessage A {\n  enum Kind {\n    KIND_NONE = 0;\n  }\n  oneof body {\n    string x = 1; // why\n    B y = 2;\n  }\n  reserved 3, 4;\n}\nmessage B {\n  repeated uint64 z = 1;\n}\n";

    fn numbers(text: &str) -> Numbers {
        let mut numbers = Numbers::new();
        numbers_in(text, &mut numbers);
        numbers
    }

    #[test]
    fn fields_are_read_by_message_and_number() {
        let found: Vec<_> = numbers(TEXT)
            .into_iter()
            .map(|(number, meaning)| format!("{number} {meaning}"))
            .collect();
        assert_eq!(
            found,
            [
                "A.1 string x",
                "A.2 B y",
                "A.3 reserved",
                "A.4 reserved",
                "A.Kind.0 KIND_NONE",
                "B.1 repeated uint64 z",
            ]
        );
    }

    #[test]
    fn a_number_may_be_added_or_reserved_but_never_re_used() {
        let given = numbers(TEXT);
        let changed =
            |from: &str, to: &str| broken_promises(&given, &numbers(&TEXT.replace(from, to)));
        assert!(changed("B y = 2;", "B y = 2;\n    B more = 9;").is_empty());
        assert!(changed("string x = 1;", "reserved 1;").is_empty());
        assert_eq!(changed("string x = 1;", "bytes x = 1;").len(), 1);
        assert_eq!(changed("string x = 1;", "").len(), 1);
    }
}
