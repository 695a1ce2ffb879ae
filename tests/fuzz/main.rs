//! Ring 5, the part that every run can afford: the corpora, and a bounded number of their mutants.
//!
//! Nothing is explored here; cargo-fuzz does that elsewhere and what it finds is added to the
//! corpora. The mutants are the same in every run, so a failure here is a failure everywhere, and
//! each is caught and printed as the bytes that did it.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by a panic")]
#![expect(
    clippy::print_stdout,
    reason = "how much was run is part of the result"
)]

mod mutate;
mod targets;

use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use mutate::Mutator;
use targets::{TARGETS, Target};

/// Mutants of a whole corpus: all targets together stay within seconds, unoptimised.
const MUTANTS: usize = 4000;

/// The longest mutant. Longer inputs belong into the corpus itself.
const MAX_LENGTH: usize = 4096;

macro_rules! replays {
    ($($name:ident),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                replay(stringify!($name));
            }
        )*

        #[test]
        fn every_target_is_replayed() {
            let names: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
            assert_eq!(names, [$(stringify!($name)),*]);
            for name in names {
                let file = Path::new(FOLDER).join("fuzz_targets").join(format!("{name}.rs"));
                assert!(file.exists(), "cargo-fuzz has no target {name}");
            }
        }
    };
}

replays! {
    agent_config,
    coordinator_config,
    control_message,
    dns_query,
    dns_upstream,
    helper_report,
    helper_request,
    join_string,
    netmap_update,
    packet,
    policy,
    policy_diff,
    policy_layout,
    policy_question,
    resolv_conf,
    state_file,
    uapi_request,
}

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz");

fn replay(name: &str) {
    let target = TARGETS.iter().find(|(known, _)| *known == name).unwrap();
    let corpus = corpus(name);
    assert!(!corpus.is_empty(), "{name} has no corpus");
    for (path, input) in &corpus {
        run(target, input, &path.display().to_string());
    }
    let inputs: Vec<&[u8]> = corpus.iter().map(|(_, input)| input.as_slice()).collect();
    let mut mutator = Mutator::new(name);
    for number in 0..MUTANTS {
        let mutant = mutator.mutant(&inputs, MAX_LENGTH);
        run(target, &mutant, &format!("mutant {number}"));
    }
    println!("{name}: {} inputs, {MUTANTS} mutants", corpus.len());
}

fn run((name, target): &Target, input: &[u8], origin: &str) {
    assert!(
        catch_unwind(|| target(input)).is_ok(),
        "{name} broke on {origin}; as a file of its corpus:\n  printf '{}'",
        input
            .iter()
            .map(|b| format!("\\x{b:02x}"))
            .collect::<String>()
    );
}

/// In the order of the files' names, so that the mutants are the same everywhere.
fn corpus(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(FOLDER).join("corpus").join(name);
    let entries = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let read = |path: PathBuf| (path.clone(), fs::read(path).unwrap());
    paths.into_iter().map(read).collect()
}
