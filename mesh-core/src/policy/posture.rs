//! Postures: what a source must be, beside whose it is.
//!
//! An attribute that nobody reported is NOT SET, and every comparison with it fails, `!=` and
//! `NOT IN` included: silence must never let anybody in.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;

use crate::node::{AttributeValue as Value, Node};

/// `ATTRIBUTE OPERATOR VALUE`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Condition {
    attribute: String,
    test: Test,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Test {
    IsSet,
    NotSet,
    Compare(Comparison, Value),
    In(Vec<Value>),
    NotIn(Vec<Value>),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Comparison {
    Equal,
    NotEqual,
    Less,
    AtMost,
    More,
    AtLeast,
}

/// Attributes by name: `node:os`.
pub(super) type Attributes = BTreeMap<String, Value>;

/// What a node reports of itself, and what the coordinator knows of it.
pub(super) fn attributes(node: &Node) -> Attributes {
    let host = &node.host;
    // As the hosted service has it: on Linux it is the kernel's, which can be compared.
    let os_version = match host.os.as_str() {
        "linux" => &host.kernel,
        _ => &host.os_version,
    };
    let texts = [
        ("node:os", &host.os),
        ("node:osVersion", os_version),
        ("node:kernel", &host.kernel),
        ("node:meshVersion", &host.agent_version),
    ];
    let reported = texts.into_iter().filter(|(_, text)| !text.is_empty());
    let mut attributes: Attributes = reported
        .map(|(name, text)| (name.to_owned(), Value::Text(text.clone())))
        .collect();
    let seen = i64::try_from(node.created.0).unwrap_or(i64::MAX);
    attributes.insert("node:firstSeen".to_owned(), Value::Number(seen));
    let kept = node.attributes.iter();
    attributes.extend(kept.map(|(name, value)| (name.as_str().to_owned(), value.clone())));
    attributes
}

/// A node has a posture where all of its conditions hold.
pub(super) fn holds(conditions: &[Condition], attributes: &Attributes) -> bool {
    conditions
        .iter()
        .all(|condition| condition.holds(attributes))
}

impl Condition {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is no condition; write \"node:os == 'linux'\", with == != < <= > >= IN ['a', 'b'], NOT IN, IS SET or NOT SET"
            )
        };
        let (attribute, rest) = text
            .trim()
            .split_once(char::is_whitespace)
            .ok_or_else(wrong)?;
        if !attribute.contains(':') {
            return Err(wrong());
        }
        let rest = rest.trim();
        let test = if let Some(test) = keyword(rest) {
            test.ok_or_else(wrong)?
        } else {
            let (comparison, value) = COMPARISONS
                .iter()
                .find_map(|(sign, comparison)| Some((*comparison, rest.strip_prefix(sign)?)))
                .ok_or_else(wrong)?;
            Test::Compare(comparison, value_of(value.trim()).ok_or_else(wrong)?)
        };
        Ok(Self {
            attribute: attribute.to_owned(),
            test,
        })
    }

    /// In words, where it does not hold: what is asked for, and what was reported.
    pub(super) fn failing(&self, attributes: &Attributes) -> Option<String> {
        if self.holds(attributes) {
            return None;
        }
        Some(match attributes.get(&self.attribute) {
            Some(value) => format!("{self} (it is {})", written(value)),
            None => format!("{self} (it was not reported)"),
        })
    }

    fn holds(&self, attributes: &Attributes) -> bool {
        let value = attributes.get(&self.attribute);
        match (&self.test, value) {
            (Test::IsSet, value) => value.is_some(),
            (Test::NotSet, value) => value.is_none(),
            (_, None) => false,
            (Test::In(list), Some(value)) => list.contains(value),
            (Test::NotIn(list), Some(value)) => !list.contains(value),
            (Test::Compare(comparison, wanted), Some(value)) => comparison.holds(value, wanted),
        }
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.attribute)?;
        let list = |values: &[Value]| {
            let values: Vec<String> = values.iter().map(written).collect();
            values.join(", ")
        };
        match &self.test {
            Test::IsSet => f.write_str(" IS SET"),
            Test::NotSet => f.write_str(" NOT SET"),
            Test::In(values) => write!(f, " IN [{}]", list(values)),
            Test::NotIn(values) => write!(f, " NOT IN [{}]", list(values)),
            Test::Compare(comparison, value) => {
                let sign = COMPARISONS.iter().find(|(_, known)| known == comparison);
                let sign = sign.map_or("", |(sign, _)| sign);
                write!(f, " {sign} {}", written(value))
            }
        }
    }
}

/// As a condition writes it.
fn written(value: &Value) -> String {
    match value {
        Value::Text(text) => format!("'{text}'"),
        Value::Number(_) | Value::Bool(_) => value.to_string(),
    }
}

/// Two-letter signs before the one-letter signs that they start with.
const COMPARISONS: [(&str, Comparison); 6] = [
    ("==", Comparison::Equal),
    ("!=", Comparison::NotEqual),
    ("<=", Comparison::AtMost),
    (">=", Comparison::AtLeast),
    ("<", Comparison::Less),
    (">", Comparison::More),
];

impl Comparison {
    fn holds(self, value: &Value, wanted: &Value) -> bool {
        match self {
            Self::Equal => return value == wanted,
            Self::NotEqual => return value != wanted,
            Self::Less | Self::AtMost | Self::More | Self::AtLeast => {}
        }
        let order = match (value, wanted) {
            (Value::Number(value), Value::Number(wanted)) => value.cmp(wanted),
            (Value::Text(value), Value::Text(wanted)) => versions(value, wanted),
            // Nothing is more or less than something of another kind.
            _ => return false,
        };
        match self {
            Self::Less => order == Ordering::Less,
            Self::AtMost => order != Ordering::Greater,
            Self::More => order == Ordering::Greater,
            Self::AtLeast => order != Ordering::Less,
            Self::Equal | Self::NotEqual => false,
        }
    }
}

/// `IS SET`, `NOT SET`, `IN […]`, `NOT IN […]`; the inner `None` where the list is malformed.
fn keyword(rest: &str) -> Option<Option<Test>> {
    let words: Vec<&str> = rest.split_whitespace().collect();
    match words[..] {
        ["IS", "SET"] => return Some(Some(Test::IsSet)),
        ["NOT", "SET"] => return Some(Some(Test::NotSet)),
        _ => {}
    }
    let (negated, list) = match rest.strip_prefix("NOT") {
        Some(list) => (true, list.trim_start()),
        None => (false, rest),
    };
    let list = list.strip_prefix("IN")?.trim();
    let values = list
        .strip_prefix('[')
        .and_then(|list| list.strip_suffix(']'))
        .and_then(|list| {
            list.split(',')
                .map(|value| value_of(value.trim()))
                .collect()
        });
    Some(values.map(|values| match negated {
        true => Test::NotIn(values),
        false => Test::In(values),
    }))
}

fn value_of(text: &str) -> Option<Value> {
    match text {
        "true" => return Some(Value::Bool(true)),
        "false" => return Some(Value::Bool(false)),
        _ => {}
    }
    for quote in ['\'', '"'] {
        if let Some(inside) = text.strip_prefix(quote) {
            let inside = inside.strip_suffix(quote)?;
            return (!inside.contains(quote)).then(|| Value::Text(inside.to_owned()));
        }
    }
    text.parse().ok().map(Value::Number)
}

/// Number by number, text by text: `1.9 < 1.10 < 1.10-rc`.
fn versions(a: &str, b: &str) -> Ordering {
    let parts = |text: &str| -> Vec<(Option<u64>, String)> {
        text.split(|c: char| !c.is_ascii_alphanumeric())
            .map(|part| (part.parse().ok(), part.to_owned()))
            .collect()
    };
    parts(a).cmp(&parts(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(text: &str) -> bool {
        let attributes = [
            ("node:os", Value::Text("linux".to_owned())),
            ("node:osVersion", Value::Text("6.12.3".to_owned())),
            ("custom:score", Value::Number(7)),
            ("custom:managed", Value::Bool(true)),
        ];
        let attributes = attributes
            .map(|(name, value)| (name.to_owned(), value))
            .into();
        Condition::parse(text).unwrap().holds(&attributes)
    }

    #[test]
    fn conditions_compare_what_was_reported() {
        for text in [
            "node:os == 'linux'",
            "node:os != \"windows\"",
            "node:os IN ['macos', 'linux']",
            "node:os NOT IN ['windows']",
            "node:osVersion >= '6.9'",
            "node:osVersion < '6.13'",
            "custom:score > 6",
            "custom:score <= 7",
            "custom:managed == true",
            "custom:managed IS SET",
            "custom:other NOT SET",
        ] {
            assert!(holds(text), "{text}");
        }
    }

    #[test]
    fn what_was_not_reported_compares_with_nothing() {
        for text in [
            "custom:other == 'a'",
            "custom:other != 'a'",
            "custom:other NOT IN ['a']",
            "custom:other < 1",
            "custom:other IS SET",
            "custom:score < 'text'",
            "node:os == 'LINUX'",
        ] {
            assert!(!holds(text), "{text}");
        }
    }

    #[test]
    fn what_is_no_condition_is_refused() {
        for text in [
            "",
            "node:os",
            "node:os = 'linux'",
            "os == 'linux'",
            "node:os IN 'linux'",
            "node:os == linux",
            "node:os == 'a' or 'b'",
            "node:os SET",
        ] {
            assert!(Condition::parse(text).is_err(), "{text:?}");
        }
    }
}
