//! Would the ebpf ring notice? Small changes to the packet path, one at a time, each built, loaded and
//! run through the ring.
//!
//! The changes are made to the text, token by token: what no longer builds or does not pass the
//! verifier does not count. What survives is a gap in the ring, or no change at all; the latter are
//! listed in `tests/ebpf/equivalent.txt`, with the reason.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::{build_ebpf, shell};

/// Everything that decides over a packet. What only measures or writes logs is not here.
const SOURCES: [&str; 11] = [
    "mesh-common/src/budget.rs",
    "mesh-common/src/flow.rs",
    "mesh-common/src/packet.rs",
    "mesh-common/src/tcp.rs",
    "mesh-common/src/verdict.rs",
    "mesh-ebpf/src/events.rs",
    "mesh-ebpf/src/filter.rs",
    "mesh-ebpf/src/guard.rs",
    "mesh-ebpf/src/mss.rs",
    "mesh-ebpf/src/stats.rs",
    "mesh-ebpf/src/tables.rs",
];
const EQUIVALENT: &str = "tests/ebpf/equivalent.txt";

/// Changes that are tried, and those that must have got as far as the ring.
const SAMPLES: usize = 60;
const COUNTED: usize = 30;

/// Tokens, and what each becomes.
const SWAPS: [(&str, &str); 26] = [
    (" == ", " != "),
    (" != ", " == "),
    (" < ", " <= "),
    (" <= ", " < "),
    (" > ", " >= "),
    (" >= ", " > "),
    (" && ", " || "),
    (" || ", " && "),
    (" += ", " = "),
    ("if !", "if "),
    ("NEXT", "DROP"),
    ("DROP", "NEXT"),
    ("true", "false"),
    ("false", "true"),
    ("CT_EST", "CT_NEW"),
    ("CT_NEW", "CT_EST"),
    ("PEER_FREED", "PEER_LOAD"),
    ("Direction::Ingress", "Direction::Egress"),
    ("Direction::Egress", "Direction::Ingress"),
    ("Stage::HalfOpen", "Stage::Established"),
    ("Stage::Established", "Stage::HalfOpen"),
    ("flags::REPLIED", "flags::RESET"),
    ("flags::DENIED", "flags::RESET"),
    ("flags::CONFIRMED", "flags::REPLIED"),
    ("Effect::Open", "Effect::Nothing"),
    ("is_none()", "is_some()"),
];

/// One change to one line.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mutant {
    file: &'static str,
    /// From 0.
    line: usize,
    before: String,
    /// `None`: the statement is dropped.
    after: Option<String>,
}

impl std::fmt::Display for Mutant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let after = self.after.as_deref().map_or("(dropped)", str::trim);
        write!(f, "{} | {} | {after}", self.file, self.before.trim())
    }
}

/// How far a mutant came.
#[derive(Debug, PartialEq, Eq)]
enum End {
    DoesNotBuild,
    DoesNotLoad,
    Caught,
    Equivalent,
    Survived,
}

/// `ring` is the ring's test program.
pub(crate) fn run(ring: &Path, seed: Option<u64>) -> Result<()> {
    let seed = seed.unwrap_or_else(|| {
        let since = std::time::SystemTime::UNIX_EPOCH.elapsed();
        since.unwrap_or_default().as_secs()
    });
    println!("seed {seed}");
    let root = shell::root();
    let mut mutants = Vec::new();
    for file in SOURCES {
        let text =
            std::fs::read_to_string(root.join(file)).with_context(|| format!("read {file}"))?;
        mutants.extend(all(file, &text));
    }
    let equivalent =
        std::fs::read_to_string(root.join(EQUIVALENT)).context("read the equivalents")?;
    println!("{} possible changes", mutants.len());
    let mut random = seed;
    let workshop = Workshop::open(root, ring)?;
    let (mut counted, mut survivors) = (0, Vec::new());
    for number in 1..=SAMPLES {
        let mutant = mutants.swap_remove((next(&mut random) % mutants.len() as u64) as usize);
        let end = workshop.try_out(&mutant, &equivalent)?;
        println!(
            "{number:2} {end:?}: {}:{} {mutant}",
            mutant.file,
            mutant.line + 1
        );
        match end {
            End::DoesNotBuild | End::DoesNotLoad => {}
            End::Caught | End::Equivalent => counted += 1,
            End::Survived => {
                counted += 1;
                survivors.push(mutant);
            }
        }
    }
    println!(
        "{counted} of {SAMPLES} came as far as the ring, {} survived",
        survivors.len()
    );
    for mutant in &survivors {
        println!("survived: {mutant}");
    }
    ensure!(counted >= COUNTED, "too few to say anything: seed {seed}");
    ensure!(survivors.is_empty(), "the ring has gaps: seed {seed}");
    Ok(())
}

/// A copy of the sources that may be changed.
struct Workshop<'a> {
    root: &'a Path,
    ring: &'a Path,
    folder: PathBuf,
}

impl<'a> Workshop<'a> {
    fn open(root: &'a Path, ring: &'a Path) -> Result<Self> {
        let folder = shell::target_dir().join("mutants");
        std::fs::create_dir_all(&folder)?;
        let copied = Command::new("cp")
            .args(["-r", "Cargo.toml", "mesh-common", "mesh-ebpf"])
            .arg(&folder)
            .current_dir(root)
            .status()?;
        ensure!(copied.success(), "copy the sources");
        let workshop = Self { root, ring, folder };
        let object = workshop.build()?.context("build the sources unchanged")?;
        if workshop.survives(&object)? != End::Survived {
            bail!("the ring fails without any change");
        }
        Ok(workshop)
    }

    fn try_out(&self, mutant: &Mutant, equivalent: &str) -> Result<End> {
        // From the copy: whoever goes on working meanwhile changes nothing here.
        let place = self.folder.join(mutant.file);
        let text = std::fs::read_to_string(&place)?;
        let changed: Vec<&str> = text
            .lines()
            .enumerate()
            .filter_map(|(number, line)| match &mutant.after {
                _ if number != mutant.line => Some(line),
                after => after.as_deref(),
            })
            .collect();
        std::fs::write(&place, changed.join("\n") + "\n")?;
        let built = self.build();
        std::fs::write(&place, text)?;
        let Some(object) = built? else {
            return Ok(End::DoesNotBuild);
        };
        let known = format!("{mutant} | ");
        match self.survives(&object)? {
            End::Survived if equivalent.lines().any(|line| line.starts_with(&known)) => {
                Ok(End::Equivalent)
            }
            end => Ok(end),
        }
    }

    fn build(&self) -> Result<Option<PathBuf>> {
        let Some(bytes) = build_ebpf::try_compile(&self.folder)? else {
            return Ok(None);
        };
        let object = self.folder.join("mutant.o");
        std::fs::write(&object, bytes)?;
        Ok(Some(object))
    }

    /// What is quick to fail comes first: most changes do not get far.
    fn survives(&self, object: &Path) -> Result<End> {
        if !self.passes(object, &["figures::every_program_loads"])? {
            return Ok(End::DoesNotLoad);
        }
        for part in [
            &["model::the_kernel"][..],
            &["kinds::"],
            &["life::", "model::a_packet", "flood::", "cpus::"],
        ] {
            if !self.passes(object, part)? {
                return Ok(End::Caught);
            }
        }
        Ok(End::Survived)
    }

    fn passes(&self, object: &Path, tests: &[&str]) -> Result<bool> {
        let status = Command::new(self.ring)
            .args(tests)
            .arg("--test-threads=1")
            .current_dir(self.root.join("tests"))
            .env("CARGO_MANIFEST_DIR", self.root.join("tests"))
            .env("MESH_EBPF_OBJECT", object)
            .env("MESH_TEST_SEED", "1")
            .env("RUST_BACKTRACE", "0")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .context("run the ring")?;
        Ok(status.success())
    }
}

/// Every change that can be made to a file.
fn all(file: &'static str, text: &str) -> Vec<Mutant> {
    let mut mutants = Vec::new();
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    for (number, line) in code.lines().enumerate() {
        let trimmed = line.trim();
        let is_code = !["//", "#", "use ", "pub use", "\""]
            .iter()
            .any(|start| trimmed.starts_with(start));
        if !is_code || trimmed.contains('"') {
            continue;
        }
        let mut push = |after: Option<String>| {
            mutants.push(Mutant {
                file,
                line: number,
                before: line.to_owned(),
                after,
            });
        };
        for (token, other) in SWAPS {
            for (at, _) in line.match_indices(token) {
                push(Some(format!(
                    "{}{other}{}",
                    &line[..at],
                    &line[at + token.len()..]
                )));
            }
        }
        for (at, digits) in numbers(line) {
            if let Ok(value) = digits.replace('_', "").parse::<u64>() {
                let rest = &line[at + digits.len()..];
                push(Some(format!("{}{}{rest}", &line[..at], value + 1)));
            }
        }
        let declares = [
            "let ", "const ", "pub ", "type ", "return", "}", "mod ", "static ",
        ]
        .iter()
        .any(|start| trimmed.starts_with(start));
        if trimmed.ends_with(';') && trimmed.contains(['=', '(']) && !declares {
            push(None);
        }
    }
    mutants
}

/// Decimal literals, with the place where each starts.
fn numbers(line: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let mut before = ' ';
    let mut chars = line.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        if c.is_ascii_digit() && !before.is_alphanumeric() && before != '_' {
            let mut end = at + 1;
            while let Some((next, c)) = chars.next_if(|(_, c)| c.is_alphanumeric() || *c == '_') {
                end = next + c.len_utf8();
            }
            found.push((at, &line[at..end]));
            before = '0';
        } else {
            before = c;
        }
    }
    found
}

/// SplitMix64 (Steele, Lea and Flood, 2014).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, expected: &[&str]) {
        let made: Vec<_> = all("f", line)
            .into_iter()
            .map(|mutant| mutant.after.unwrap_or_default())
            .collect();
        assert_eq!(made, expected, "{line}");
    }

    #[test]
    fn each_token_of_a_line_changes_by_itself() {
        check(
            "if a == 1 && b < 2 {",
            &[
                "if a != 1 && b < 2 {",
                "if a == 1 && b <= 2 {",
                "if a == 1 || b < 2 {",
                "if a == 2 && b < 2 {",
                "if a == 1 && b < 3 {",
            ],
        );
        check("touch(entry);", &[""]);
        check("let x1 = y;", &[]);
        check("// a == b", &[]);
        check("NotIp = 3, \"not ip\",", &[]);
        check(
            "const N: u64 = 8_000 * SECOND;",
            &["const N: u64 = 8001 * SECOND;"],
        );
    }
}
