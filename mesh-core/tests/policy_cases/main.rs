//! Holds our policy to answers recorded from the service whose language it speaks.
//!
//! The cases are not part of this repository: they are looked for in the folder that
//! `MESH_POLICY_CASES` names, or in `shared/policy-cases` beside the checkout. In CI they must be
//! there.
#![expect(clippy::unwrap_used, reason = "tests panic freely")]

use std::io::Write as _;
use std::path::PathBuf;

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

fn folder() -> Option<PathBuf> {
    let folder = std::env::var_os("MESH_POLICY_CASES").map_or_else(
        || {
            PathBuf::from(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../../shared/policy-cases"
            ))
        },
        PathBuf::from,
    );
    if folder.is_dir() {
        return Some(folder);
    }
    let missing = format!(
        "no recorded policy cases in {}: set MESH_POLICY_CASES to their folder",
        folder.display()
    );
    assert!(std::env::var_os("CI").is_none(), "{missing}");
    say(&missing);
    None
}

#[test]
fn recorded_cases_are_answered_as_recorded() {
    let Some(folder) = folder() else { return };
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "jsonl"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no *.jsonl in {}", folder.display());
    let only = std::env::var("MESH_POLICY_CASE").unwrap_or_default();
    let mut broken = Vec::new();
    for file in files {
        let set = file.file_stem().unwrap().to_string_lossy().into_owned();
        let (exact, counted) = run(&std::fs::read_to_string(&file).unwrap(), &only);
        say(&format!("{set}: exact {exact} of {counted}"));
        if exact < counted {
            broken.push(set);
        }
    }
    assert!(broken.is_empty(), "not every case is exact in {broken:?}");
}

/// How many of the cases that count are exact, and how many count.
fn run(text: &str, only: &str) -> (usize, usize) {
    let (mut exact, mut counted) = (0, 0);
    for line in text.lines() {
        let case: Case = serde_json::from_str(line).unwrap();
        if !case.id.contains(only) {
            continue;
        }
        let differences = compare::differences(&case);
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
