//! Health conditions: what is wrong on this node, and what to do about it.
//!
//! Conditions are named and level-triggered: a part raises or clears its own, and what people see
//! is the set that stands now.

use std::collections::BTreeMap;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Severity {
    Info,
    Warning,
    Error,
}

/// One thing that is wrong now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Condition {
    pub severity: Severity,
    /// What is wrong, with the figure that shows it.
    pub text: String,
    /// What the operator does next.
    pub next_step: &'static str,
}

/// Every condition that stands, by name (`BuiltWithoutEbpf`, `CoordinatorUnreachable`).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Health(BTreeMap<&'static str, Condition>);

impl Health {
    pub fn raise(&mut self, name: &'static str, condition: Condition) {
        self.0.insert(name, condition);
    }

    pub fn clear(&mut self, name: &'static str) {
        self.0.remove(name);
    }

    pub fn set(&mut self, name: &'static str, condition: Option<Condition>) {
        match condition {
            Some(condition) => self.raise(name, condition),
            None => self.clear(name),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &Condition)> {
        self.0.iter().map(|(name, condition)| (*name, condition))
    }
}
