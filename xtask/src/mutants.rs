//! Would the ebpf ring notice? Small changes to the packet path, one at a time, each built, loaded and
//! run through the ring.
//!
//! The changes are made to the text, token by token: what no longer builds, does not pass the verifier
//! or compiles to the very same programs does not count. What survives is a gap in the ring, or nothing
//! that anybody could notice; the latter is listed in `tests/ebpf/equivalent.txt`, with the reason, and
//! must survive.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::{build_ebpf, shell};

/// Everything that decides over a packet. What only measures or writes logs is not here.
const SOURCES: &[&str] = &[
    "mesh-common/src/budget.rs",
    "mesh-common/src/flow.rs",
    "mesh-common/src/half_open.rs",
    "mesh-common/src/identity.rs",
    "mesh-common/src/packet.rs",
    "mesh-common/src/packet/network.rs",
    "mesh-common/src/packet/quoted.rs",
    "mesh-common/src/packet/transport.rs",
    "mesh-common/src/packet/usual.rs",
    "mesh-common/src/place.rs",
    "mesh-common/src/policy.rs",
    "mesh-common/src/policy/bucket.rs",
    "mesh-common/src/policy/row.rs",
    "mesh-common/src/proto.rs",
    "mesh-common/src/tcp.rs",
    "mesh-common/src/verdict.rs",
    "mesh-common/src/verdict/judged.rs",
    "mesh-common/src/verdict/opening.rs",
    "mesh-ebpf/src/detour.rs",
    "mesh-ebpf/src/entry.rs",
    "mesh-ebpf/src/established.rs",
    "mesh-ebpf/src/events.rs",
    "mesh-ebpf/src/filter.rs",
    "mesh-ebpf/src/guard.rs",
    "mesh-ebpf/src/half_open.rs",
    "mesh-ebpf/src/meta.rs",
    "mesh-ebpf/src/mss.rs",
    "mesh-ebpf/src/peers.rs",
    "mesh-ebpf/src/policy.rs",
    "mesh-ebpf/src/scratch.rs",
    "mesh-ebpf/src/skb.rs",
    "mesh-ebpf/src/stats.rs",
    "mesh-ebpf/src/tables.rs",
    "mesh-ebpf/src/tc.rs",
];
const EQUIVALENT: &str = "tests/ebpf/equivalent.txt";

/// Changes that are tried, and those that must have got as far as the ring.
const SAMPLES: usize = 60;
const COUNTED: usize = 30;

/// The ring, and by how much its random part is shortened: what is quick to fail comes first, as most
/// changes do not get far. Left out is what tries the agent's side of the tables, or an hour's traffic.
const PARTS: [(&[&str], u32); 3] = [
    (&["model::the_kernel"], 100),
    (
        &[
            "flows::",
            "judged_anew::",
            "events::",
            "told::",
            "headers::",
            "icmp::",
            "budgets::",
            "rows::",
            "mss::",
            "nonlinear::",
            "detour::",
            "guard::",
            "half_open::",
            "place::",
            "short_way::",
            "tables::who_is_on_this_side",
        ],
        1,
    ),
    (
        &[
            "model::the_kernel",
            "model::a_packet",
            "flood::one",
            "cpus::",
        ],
        5,
    ),
];
const LOADS: &str = "figures::every_program_loads";

/// Tokens, and what each becomes.
const SWAPS: [(&str, &str); 24] = [
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

impl Mutant {
    fn place(&self) -> String {
        format!("{}:{}", self.file, self.line + 1)
    }
}

impl std::fmt::Display for Mutant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let after = self.after.as_deref().map_or("(dropped)", str::trim);
        write!(f, "{} | {} | {after}", self.file, self.before.trim())
    }
}

/// How far a mutant came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    DoesNotBuild,
    /// The compiler sees no change.
    Same,
    DoesNotLoad,
    Caught,
    /// Survived, as listed.
    Equivalent,
    /// Listed, and yet caught.
    NotEquivalent,
    Survived,
}

impl End {
    fn counts(self) -> bool {
        match self {
            Self::DoesNotBuild | Self::Same | Self::DoesNotLoad => false,
            Self::Caught | Self::Equivalent | Self::NotEquivalent | Self::Survived => true,
        }
    }
}

/// `ring` is the ring's test program. With `only`, every change to a place that contains it is tried,
/// and a sample of all otherwise.
pub(crate) fn run(ring: &Path, seed: Option<u64>, only: Option<&str>) -> Result<()> {
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
    match only {
        Some(only) => mutants.retain(|mutant| mutant.place().contains(only)),
        None => {
            let seed = seed.unwrap_or_else(|| {
                let since = std::time::SystemTime::UNIX_EPOCH.elapsed();
                since.unwrap_or_default().as_secs()
            });
            println!("seed {seed}");
            shuffle(&mut mutants, seed);
        }
    }
    let workshop = Workshop::open(root, ring)?;
    let (mut tried, mut counted, mut gaps) = (0, 0, Vec::new());
    for mutant in mutants {
        if only.is_none() && tried >= SAMPLES && counted >= COUNTED {
            break;
        }
        let end = workshop.try_out(&mutant, &equivalent)?;
        tried += 1;
        counted += usize::from(end.counts());
        println!("{tried:3} {end:?}: {} {mutant}", mutant.place());
        if matches!(end, End::Survived | End::NotEquivalent) {
            gaps.push((end, mutant));
        }
    }
    println!("{counted} of {tried} came as far as the ring");
    for (end, mutant) in &gaps {
        println!("{end:?}: {} {mutant}", mutant.place());
    }
    ensure!(
        only.is_some() || counted >= COUNTED,
        "too few came as far as the ring to say anything"
    );
    ensure!(gaps.is_empty(), "the ring has gaps, or the list is wrong");
    Ok(())
}

/// A copy of the sources that may be changed.
struct Workshop<'a> {
    root: &'a Path,
    ring: &'a Path,
    folder: PathBuf,
    unchanged: Vec<u8>,
}

impl<'a> Workshop<'a> {
    fn open(root: &'a Path, ring: &'a Path) -> Result<Self> {
        let folder = shell::target_dir().join("mutants");
        // What a killed test leaves is an empty folder.
        std::fs::create_dir_all(folder.join("tmp"))?;
        let copied = Command::new("cp")
            .args(["-r", "Cargo.toml", "mesh-common", "mesh-ebpf"])
            .arg(&folder)
            .current_dir(root)
            .status()?;
        ensure!(copied.success(), "copy the sources");
        let unchanged = build_ebpf::try_compile(&folder)?.context("build the sources unchanged")?;
        let workshop = Self {
            root,
            ring,
            folder,
            unchanged,
        };
        workshop.place(&workshop.unchanged)?;
        if workshop.survives()? != End::Survived {
            bail!("the ring fails without any change");
        }
        Ok(workshop)
    }

    fn try_out(&self, mutant: &Mutant, equivalent: &str) -> Result<End> {
        // From the copy: whoever goes on working meanwhile changes nothing here.
        let place = self.folder.join(mutant.file);
        let text = std::fs::read_to_string(&place)?;
        // A dropped statement leaves its line, and all others where they were.
        let changed: Vec<&str> = text
            .lines()
            .enumerate()
            .map(|(number, line)| match &mutant.after {
                _ if number != mutant.line => line,
                after => after.as_deref().unwrap_or_default(),
            })
            .collect();
        std::fs::write(&place, changed.join("\n") + "\n")?;
        let built = build_ebpf::try_compile(&self.folder);
        std::fs::write(&place, text)?;
        let Some(object) = built? else {
            return Ok(End::DoesNotBuild);
        };
        if build_ebpf::is_same_code(&self.unchanged, &object)? {
            return Ok(End::Same);
        }
        self.place(&object)?;
        let known = format!("{mutant} | ");
        let is_listed = equivalent.lines().any(|line| line.starts_with(&known));
        Ok(match self.survives()? {
            End::Survived if is_listed => End::Equivalent,
            End::Caught if is_listed => End::NotEquivalent,
            end => end,
        })
    }

    fn object(&self) -> PathBuf {
        self.folder.join("mutant.o")
    }

    fn place(&self, object: &[u8]) -> Result<()> {
        std::fs::write(self.object(), object).context("write the object")
    }

    fn survives(&self) -> Result<End> {
        for (tests, scale) in PARTS {
            if self.passes(tests, scale)? {
                continue;
            }
            // Every test fails with programs that the verifier refuses.
            return Ok(if self.passes(&[LOADS], 1)? {
                End::Caught
            } else {
                End::DoesNotLoad
            });
        }
        Ok(End::Survived)
    }

    /// Until the first test fails. In a mount namespace of its own, so that what the tests have mounted
    /// goes with them.
    fn passes(&self, tests: &[&str], scale: u32) -> Result<bool> {
        let mut ring = Command::new("unshare")
            .arg("--mount")
            .arg(self.ring)
            .args(tests)
            .arg("--test-threads=1")
            .current_dir(self.root.join("tests"))
            .env("CARGO_MANIFEST_DIR", self.root.join("tests"))
            .env("MESH_EBPF_OBJECT", self.object())
            .env("MESH_TEST_SEED", "1")
            .env("MESH_TIME_SCALE", scale.to_string())
            .env("RUST_BACKTRACE", "0")
            .env("TMPDIR", self.folder.join("tmp"))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("run the ring")?;
        let stdout = ring.stdout.take().context("read the ring")?;
        for line in BufReader::new(stdout).lines() {
            if line.context("read the ring")?.ends_with("... FAILED") {
                ring.kill().context("end the ring")?;
                ring.wait().context("wait for the ring")?;
                return Ok(false);
            }
        }
        Ok(ring.wait().context("wait for the ring")?.success())
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

/// Fisher and Yates, in Durstenfeld's version (1964).
fn shuffle<T>(items: &mut [T], seed: u64) {
    let mut random = seed;
    for last in (1..items.len()).rev() {
        items.swap(last, (next(&mut random) % (last as u64 + 1)) as usize);
    }
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
    fn what_is_listed_can_be_made_and_has_a_reason() {
        let root = shell::root();
        let listed = std::fs::read_to_string(root.join(EQUIVALENT)).unwrap();
        let made: Vec<String> = SOURCES
            .iter()
            .flat_map(|file| all(file, &std::fs::read_to_string(root.join(file)).unwrap()))
            .map(|mutant| format!("{mutant} | "))
            .collect();
        for line in listed.lines().filter(|line| !line.starts_with('#')) {
            let reason = made
                .iter()
                .find_map(|made| line.strip_prefix(made.as_str()));
            assert!(
                reason.is_some_and(|reason| !reason.trim().is_empty()),
                "{line}"
            );
        }
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
