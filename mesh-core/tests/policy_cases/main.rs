//! Holds our policy to answers recorded from the service whose language it speaks.
//!
//! The cases are not part of this repository: they are looked for in the folder that
//! `MESH_POLICY_CASES` names, or in `shared/policy-cases` beside the checkout. In CI they must be
//! there.
#![expect(clippy::unwrap_used, reason = "tests panic freely")]

use std::io::Write as _;

mod case;
mod compare;
mod services;
#[path = "../support/mod.rs"]
mod support;

use case::Case;

/// Differences that are printed of one case.
const SHOWN: usize = 6;

/// Printed even where the test passes, which the harness would swallow.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[test]
fn recorded_cases_are_answered_as_recorded() {
    let Some(folder) = case::folder() else {
        return;
    };
    let only = std::env::var("MESH_POLICY_CASE").unwrap_or_default();
    let mut broken = Vec::new();
    for (set, cases) in case::read(&folder) {
        let (exact, counted) = run(&cases, &only);
        say(&format!("{set}: exact {exact} of {counted}"));
        if exact < counted {
            broken.push(set);
        }
    }
    assert!(broken.is_empty(), "not every case is exact in {broken:?}");
}

/// How many of the cases that count are exact, and how many count.
fn run(cases: &[Case], only: &str) -> (usize, usize) {
    let (mut exact, mut counted) = (0, 0);
    for case in cases.iter().filter(|case| case.id.contains(only)) {
        let differences = compare::differences(case);
        let note = if case.optional { " (optional)" } else { "" };
        if !differences.is_empty() {
            say(&format!(
                "{}{note}: {} differences",
                case.id,
                differences.len()
            ));
        }
        for difference in differences.iter().take(SHOWN) {
            say(&format!("    {difference}"));
        }
        if !case.optional {
            counted += 1;
            exact += usize::from(differences.is_empty());
        }
    }
    (exact, counted)
}
