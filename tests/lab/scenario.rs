//! What a mesh is held to: each scenario is a function, run by `demo --check` and by the netns ring.
//!
//! A scenario takes a running mesh of the four roles and leaves it running, with the policy that
//! it found. What it asserts it says in sentences, because the demo prints them.

pub mod agent;
pub mod count;
pub mod damage;
pub mod edit;
pub mod enrol;
pub mod forge;
pub mod garbage;
pub mod keys;
pub mod reach;
pub mod restart;

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

/// Takes down assertions and figures.
pub struct Check {
    held: usize,
    figures: Vec<Figure>,
    print: fn(&str),
}

impl std::fmt::Debug for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Check")
            .field("figures", &self.figures)
            .finish_non_exhaustive()
    }
}

/// Something measured.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    pub name: &'static str,
    pub value: f64,
    pub unit: &'static str,
}

impl Check {
    /// Every line goes to `print` as soon as it is known.
    pub fn new(print: fn(&str)) -> Self {
        Self {
            held: 0,
            figures: Vec::new(),
            print,
        }
    }

    /// For tests: their names say what is asserted.
    pub fn quiet() -> Self {
        Self::new(|_| {})
    }

    /// One assertion. Its sentence is printed when it holds, and heads the error when not.
    pub fn that<T>(&mut self, sentence: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let begun = Instant::now();
        let outcome = work();
        self.held += usize::from(outcome.is_ok());
        let verdict = if outcome.is_ok() { "ok  " } else { "FAIL" };
        (self.print)(&format!(
            "{verdict} {sentence} ({:.1} s)",
            begun.elapsed().as_secs_f64()
        ));
        outcome.with_context(|| sentence.to_owned())
    }

    /// A measured time.
    pub fn seconds(&mut self, name: &'static str, value: Duration) {
        self.figure(name, value.as_secs_f64(), "s");
    }

    pub fn figure(&mut self, name: &'static str, value: f64, unit: &'static str) {
        (self.print)(&format!("     {name}: {value:.3} {unit}"));
        self.figures.push(Figure { name, value, unit });
    }

    /// How many assertions held.
    pub fn held(&self) -> usize {
        self.held
    }

    pub fn figures(&self) -> &[Figure] {
        &self.figures
    }
}
