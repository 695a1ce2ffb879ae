//! What runs inside the virtual machine: which binaries, with which limits.
//!
//! Built by cargo, which answers in JSON where each binary lies: names of test binaries carry a
//! hash.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use mesh_tests::vm::{Clock, Guest, RELEASE_FOLDER, owned, plan::Step, stripped, tool};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Suite {
    /// What the kernel can do, as docs/kernel-support.md says.
    Kernel,
    /// Every WireGuard backend, kernel included, held to one set of scenarios.
    Conformance,
    /// The real programs in this kernel, held to the tests' own evaluator.
    Ebpf,
    /// Of that, whether this kernel loads every program, and at what cost.
    Figures,
    /// Every turn of an agent's life under traffic, with the kernel's WireGuard.
    Dataplane,
    /// What the demo asserts of a whole mesh, with the kernel's WireGuard.
    Demo,
}

impl Suite {
    /// Asks how soon something happens on several nodes at once, which has an answer only where no other machine
    /// is at work.
    pub(crate) fn goes_by_the_clock(self) -> bool {
        self == Self::Demo
    }

    fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }

    fn recipe(self) -> Recipe {
        match self {
            Self::Kernel => Recipe {
                program: Program::Test("kernel"),
                arguments: &["--show-output"],
                filter: None,
                environment: &[],
                threads: 1,
                limit_seconds: 600,
            },
            Self::Conformance => Recipe {
                program: Program::Test("conformance"),
                arguments: &[],
                filter: None,
                environment: &[("MESH_BACKEND", "kernel")],
                threads: 1,
                limit_seconds: 1800,
            },
            Self::Ebpf => Recipe {
                program: Program::Test("ebpf"),
                arguments: &["--show-output"],
                filter: None,
                environment: &[("MESH_POLICY_CASES", CASES)],
                threads: 2,
                limit_seconds: 1800,
            },
            Self::Figures => Recipe {
                filter: Some("figures"),
                limit_seconds: 600,
                ..Self::Ebpf.recipe()
            },
            Self::Dataplane => Recipe {
                program: Program::Test("netns"),
                arguments: &["--show-output"],
                filter: Some("dataplane"),
                environment: &[("MESH_BACKEND", "kernel")],
                threads: 1,
                limit_seconds: 3600,
            },
            Self::Demo => Recipe {
                program: Program::Release("mesh-demo"),
                arguments: &["--check", "--backend", "kernel"],
                filter: None,
                environment: &[],
                threads: 1,
                limit_seconds: 1800,
            },
        }
    }
}

struct Recipe {
    program: Program,
    arguments: &'static [&'static str],
    /// Which tests, when nobody says.
    filter: Option<&'static str>,
    environment: &'static [(&'static str, &'static str)],
    /// The machine has two processors, of which laboratories ask for all that there is.
    threads: u32,
    /// Several times what it takes on an idle machine.
    limit_seconds: u64,
}

enum Program {
    /// A test binary of this package.
    Test(&'static str),
    /// A program of the release build, which is no harness: a filter that is not its name passes
    /// it over.
    Release(&'static str),
}

/// Where recorded policy cases lie inside.
const CASES: &str = "/policy-cases";

const RELEASE: &[&str] = &["mesh-agent", "mesh", "mesh-coordinator", "mesh-dns-helper"];

pub(crate) fn build(suites: &[Suite], filter: Option<&str>, target: &Path) -> Result<Guest> {
    let folder = target.join("vm/programs");
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let object = env::var_os("MESH_EBPF_OBJECT")
        .map_or_else(|| target.join("ebpf/mesh-ebpf.o"), PathBuf::from);
    let release = env::var_os("MESH_BIN_DIR").map_or_else(|| target.join("release"), PathBuf::from);
    let recipes: Vec<_> = suites
        .iter()
        .map(|suite| (suite.name(), suite.recipe()))
        .collect();
    let tests = cargo(
        recipes
            .iter()
            .filter_map(|(_, recipe)| match recipe.program {
                Program::Test(name) => Some(name),
                Program::Release(_) => None,
            }),
    )?;

    let init = Path::new(env!("CARGO_BIN_EXE_mesh-vm-init"));
    let mut programs = vec![("/init".to_owned(), stripped(init, &folder)?)];
    let mut steps = Vec::new();
    for (suite, recipe) in recipes {
        let mut command = match recipe.program {
            Program::Test(name) => {
                let source = tests.get(name);
                let source = source.with_context(|| format!("cargo built no {name}"))?;
                let at = format!("/tests/{name}");
                programs.push((at.clone(), stripped(source, &folder)?));
                let threads = format!("--test-threads={}", recipe.threads);
                let filter = filter.or(recipe.filter);
                [at, threads]
                    .into_iter()
                    .chain(filter.map(str::to_owned))
                    .collect()
            }
            Program::Release(name) if filter.is_some_and(|filter| !name.contains(filter)) => {
                continue;
            }
            Program::Release(name) => {
                let at = format!("{RELEASE_FOLDER}/{name}");
                programs.push((at.clone(), release.join(name)));
                vec![at]
            }
        };
        command.extend(recipe.arguments.iter().copied().map(str::to_owned));
        let mut environment: BTreeMap<_, _> = owned(recipe.environment);
        // Decides whether what is missing is a failure.
        environment.extend(env::var("CI").map(|value| ("CI".to_owned(), value)));
        steps.push(Step {
            name: suite,
            command,
            environment,
            limit_seconds: recipe.limit_seconds,
        });
    }
    for name in RELEASE {
        programs.push((format!("{RELEASE_FOLDER}/{name}"), release.join(name)));
    }
    let guest = Guest {
        clock: Clock::Host,
        steps,
        programs,
        files: cases()?,
        object,
    };
    guest.check()?;
    Ok(guest)
}

/// The recorded policy cases, if they are anywhere: they are no part of the checkout.
fn cases() -> Result<Vec<(String, PathBuf)>> {
    let folder = env::var_os("MESH_POLICY_CASES").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/policy-cases"),
        PathBuf::from,
    );
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let files = fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
    files
        .map(|file| {
            let file = file.context("read the policy cases")?;
            let at = format!("{CASES}/{}", file.file_name().display());
            Ok((at, file.path()))
        })
        .collect()
}

/// Builds test targets of this package; their programs by their names.
///
/// For the whole workspace, as `cargo xtask test` does: of one package alone, cargo would unify
/// features differently and build the dependencies again.
fn cargo<'a>(tests: impl Iterator<Item = &'a str>) -> Result<BTreeMap<String, PathBuf>> {
    let mut tests = tests.peekable();
    if tests.peek().is_none() {
        return Ok(BTreeMap::new());
    }
    let mut command = tool(&env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()));
    command
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["test", "--locked", "--no-run", "--workspace"])
        .args(["--message-format", "json-render-diagnostics"]);
    for test in tests {
        command.args(["--test", test]);
    }
    // What cargo sets for us would reach the build scripts inside, and build them anew.
    for (name, _) in env::vars().filter(|(name, _)| name.starts_with("CARGO_PKG_")) {
        command.env_remove(name);
    }
    command.env_remove("CARGO_MANIFEST_DIR");
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .context("run cargo")?;
    ensure!(output.status.success(), "cargo test: {}", output.status);
    let mut executables = BTreeMap::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let message: serde_json::Value = serde_json::from_str(line).context("read cargo")?;
        if let (Some(path), Some(name)) = (
            message["executable"].as_str(),
            message["target"]["name"].as_str(),
        ) {
            executables.insert(name.to_owned(), PathBuf::from(path));
        }
    }
    Ok(executables)
}
