//! All tests, or one ring of them.
//!
//! Everything is compiled in one build, so that each crate is compiled once whatever runs; the
//! test programs are then started one by one, in the order of what they need: first those that
//! need nothing, the laboratories (one scenario at a time) last.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};

use crate::{build_ebpf, demo, mutants, setup, shell};

#[derive(Debug, Parser)]
pub(crate) struct Options {
    /// Only this ring.
    ring: Option<Ring>,
    /// Only tests whose name contains this; with --mutants, every change to FILE:LINE that contains it.
    filter: Option<String>,
    /// Series of Debian's kernels for the vm ring, as often as wanted; 6.1 and 6.12 otherwise.
    #[arg(long, value_name = "VERSION")]
    kernel: Vec<String>,
    /// Changes the packet path in small ways, one at a time: the ebpf ring must notice each.
    #[arg(long)]
    mutants: bool,
    /// Which changes; printed, so that they can be made again.
    #[arg(long, requires = "mutants")]
    seed: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Ring {
    /// A whole mesh in one thread and virtual time.
    Sim,
    /// Corpora replayed through every decoder.
    Fuzz,
    /// The real object, judged by BPF_PROG_TEST_RUN.
    Ebpf,
    /// Real binaries in network namespaces.
    Netns,
    /// Other kernels, in QEMU; all of it only by name.
    Vm,
}

impl Ring {
    const ALL: [Self; 5] = [Self::Sim, Self::Fuzz, Self::Ebpf, Self::Netns, Self::Vm];

    fn name(self) -> &'static str {
        match self {
            Self::Sim => "sim",
            Self::Fuzz => "fuzz",
            Self::Ebpf => "ebpf",
            Self::Netns => "netns",
            Self::Vm => "vm",
        }
    }

    /// The test targets that it is made of.
    fn targets(self) -> &'static [&'static str] {
        match self {
            Self::Sim => &["sim"],
            Self::Fuzz => &["fuzz"],
            Self::Ebpf => &["ebpf"],
            Self::Netns => &["netns", "conformance"],
            Self::Vm => &["vm"],
        }
    }

    /// These change the machine's namespaces, devices or BPF file system.
    fn needs_root(self) -> bool {
        match self {
            Self::Sim | Self::Fuzz => false,
            Self::Ebpf | Self::Netns | Self::Vm => true,
        }
    }

    fn runs_binaries(self) -> bool {
        matches!(self, Self::Netns | Self::Vm)
    }
}

impl Options {
    pub(crate) fn everything() -> Self {
        Self {
            ring: None,
            filter: None,
            kernel: Vec::new(),
            mutants: false,
            seed: None,
        }
    }

    pub(crate) fn run(self) -> Result<()> {
        let ring = self.ring;
        if ring.is_none_or(Ring::needs_root) {
            shell::step("setup", || setup::prepare(setup::Purpose::Test))?;
            shell::step("build the eBPF object", || build_ebpf::build().map(drop))?;
        }
        if ring.is_none_or(Ring::runs_binaries) {
            demo::build_release()?;
        }
        let programs = shell::step("build the tests", || self.build())?;
        if self.mutants {
            let ring = programs.iter().find(|p| p.ring == Some(Ring::Ebpf));
            let ring = ring.context("say `test ebpf --mutants`")?;
            return mutants::run(&ring.executable, self.seed, self.filter.as_deref());
        }
        let mut tally = Tally::default();
        for program in &programs {
            tally.add(self.run_program(program)?);
        }
        if ring.is_none() {
            tally.add(doc_tests()?);
        }
        let Tally {
            passed,
            failed,
            broken,
        } = tally;
        if !broken.is_empty() {
            eprintln!("failed: {}", broken.join(", "));
        }
        println!("{passed} passed, {failed} failed");
        if failed > 0 || !broken.is_empty() {
            bail!("tests failed");
        }
        if passed == 0 && self.filter.is_some() {
            bail!("no test has run: nothing is called like that");
        }
        Ok(())
    }

    fn build(&self) -> Result<Vec<Program>> {
        let mut build = shell::cargo();
        build.args(["test", "--locked", "--no-run", "--workspace"]);
        if let Some(ring) = self.ring {
            for target in ring.targets() {
                build.args(["--test", target]);
            }
        }
        build.arg("--message-format=json-render-diagnostics");
        shell::announce(&build);
        let mut programs: Vec<_> = shell::output(&mut build)?
            .lines()
            .filter_map(|line| Program::of(&serde_json::from_str(line).ok()?))
            .collect();
        programs.sort();
        Ok(programs)
    }

    fn run_program(&self, program: &Program) -> Result<Tally> {
        let mut command = Command::new(&program.executable);
        command
            .current_dir(&program.folder)
            .env("CARGO_MANIFEST_DIR", &program.folder)
            .env("MESH_BIN_DIR", shell::target_dir().join("release"));
        if let Some(filter) = &self.filter {
            command.arg(filter);
        }
        match program.ring {
            Some(Ring::Netns) => {
                command.arg("--test-threads=1");
            }
            Some(Ring::Vm) => {
                // Whoever names the ring gets all of it.
                if self.ring.is_none() {
                    command.arg("--brief");
                }
                for kernel in &self.kernel {
                    command.args(["--kernel", kernel]);
                }
            }
            Some(Ring::Sim | Ring::Fuzz | Ring::Ebpf) | None => {}
        }
        watched(&mut command, &program.name)
    }
}

/// One test program that cargo built.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Program {
    ring: Option<Ring>,
    name: String,
    folder: PathBuf,
    executable: PathBuf,
}

impl Program {
    /// Of one line of cargo's JSON, if that line is about a test program.
    fn of(message: &serde_json::Value) -> Option<Self> {
        if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
            return None;
        }
        let folder = Path::new(message["manifest_path"].as_str()?).parent()?;
        let target = message["target"]["name"].as_str()?;
        let of_rings = folder.file_name()? == "tests";
        let ring = Ring::ALL
            .into_iter()
            .find(|ring| of_rings && ring.targets().contains(&target));
        Some(Self {
            ring,
            name: ring.map_or_else(
                || {
                    format!(
                        "{} {target}",
                        folder.file_name().unwrap_or_default().display()
                    )
                },
                |ring| match ring.name() {
                    name if name == target => format!("ring {name}"),
                    name => format!("ring {name}, {target}"),
                },
            ),
            folder: folder.to_owned(),
            executable: message["executable"].as_str()?.into(),
        })
    }
}

fn doc_tests() -> Result<Tally> {
    let mut command = shell::cargo();
    command.args(["test", "--locked", "--workspace", "--doc"]);
    watched(&mut command, "doc tests")
}

/// Runs a test program, passes on what it prints, and reads its closing lines.
fn watched(command: &mut Command, name: &str) -> Result<Tally> {
    eprintln!("==> {name}");
    shell::announce(command);
    let begun = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {name}"))?;
    let stdout = child.stdout.take().context("read a test program")?;
    let mut tally = Tally::default();
    for line in BufReader::new(stdout).lines() {
        let line = line.with_context(|| format!("read what {name} prints"))?;
        println!("{line}");
        tally.read(&line);
    }
    let status = child.wait().with_context(|| format!("wait for {name}"))?;
    eprintln!("    {name}: {:.1} s", begun.elapsed().as_secs_f64());
    if !status.success() {
        tally.broken.push(format!("{name} ({status})"));
    }
    Ok(tally)
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    /// Programs that did not end well, whatever they counted.
    broken: Vec<String>,
}

impl Tally {
    /// Counts from a closing line: `test result: ok. 12 passed; 0 failed; …`.
    fn read(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else {
            return;
        };
        let words: Vec<_> = result.split([' ', ';']).collect();
        for pair in words.windows(2) {
            let Ok(count) = pair[0].parse::<u64>() else {
                continue;
            };
            match pair[1] {
                "passed" => self.passed += count,
                "failed" => self.failed += count,
                _ => {}
            }
        }
    }

    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.broken.extend(other.broken);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_counted_and_nothing_else_is() {
        let mut tally = Tally::default();
        tally.read("running 3 tests");
        tally.read("test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.00s");
        tally.read("test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured");
        assert_eq!((tally.passed, tally.failed), (4, 2));
    }

    #[test]
    fn laboratories_run_after_everything_else() {
        let program = |ring, name: &str| Program {
            ring,
            name: name.into(),
            folder: PathBuf::new(),
            executable: PathBuf::new(),
        };
        let mut programs = [
            program(Some(Ring::Netns), "a"),
            program(Some(Ring::Sim), "b"),
            program(None, "z"),
        ];
        programs.sort();
        assert_eq!(programs.map(|p| p.name), ["z", "b", "a"]);
    }
}
