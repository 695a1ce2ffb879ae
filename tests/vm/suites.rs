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

use crate::{
    initramfs::{self, Tree},
    owned,
    plan::Step,
    run::tool,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Suite {
    /// What the kernel can do, as docs/kernel-support.md says.
    Kernel,
    /// Every WireGuard backend, kernel included, held to one set of scenarios.
    Conformance,
}

impl Suite {
    /// What runs when no suite is named. A suite joins when it was seen whole on both kernels;
    /// `conformance` was not yet: `--suite conformance` runs it.
    pub(crate) fn usual() -> Vec<Self> {
        vec![Self::Kernel]
    }

    fn recipe(self) -> Recipe {
        match self {
            Self::Kernel => Recipe {
                program: Program::Test("kernel"),
                arguments: &["--show-output"],
                environment: &[],
                limit_seconds: 300,
            },
            Self::Conformance => Recipe {
                program: Program::Test("conformance"),
                arguments: &[],
                environment: &[("MESH_BACKEND", "kernel")],
                limit_seconds: 600,
            },
        }
    }
}

struct Recipe {
    program: Program,
    arguments: &'static [&'static str],
    environment: &'static [(&'static str, &'static str)],
    /// Several times what it takes on an idle machine.
    limit_seconds: u64,
}

enum Program {
    /// A test binary of this package.
    Test(&'static str),
}

#[derive(Debug)]
pub(crate) struct Built {
    pub(crate) steps: Vec<Step>,
    /// Where each goes inside, and where it lies.
    programs: Vec<(String, PathBuf)>,
    object: PathBuf,
}

impl Built {
    pub(crate) fn place(&self, tree: &mut Tree) -> Result<()> {
        for (at, source) in &self.programs {
            tree.program(at, source)?;
        }
        tree.file(OBJECT, &self.object);
        Ok(())
    }
}

/// Where the eBPF object lies inside.
pub(crate) const OBJECT: &str = "/mesh/mesh-ebpf.o";

/// Where the programs under test lie inside.
pub(crate) const RELEASE_FOLDER: &str = "/mesh/bin";

const RELEASE: &[&str] = &["mesh-agent", "mesh", "mesh-coordinator", "mesh-dns-helper"];

pub(crate) fn build(suites: &[Suite], filter: Option<&str>, target: &Path) -> Result<Built> {
    let folder = target.join("vm/programs");
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let object = env::var_os("MESH_EBPF_OBJECT")
        .map_or_else(|| target.join("ebpf/mesh-ebpf.o"), PathBuf::from);
    let release = env::var_os("MESH_BIN_DIR").map_or_else(|| target.join("release"), PathBuf::from);
    let recipes: Vec<_> = suites.iter().map(|suite| suite.recipe()).collect();
    let tests = cargo(recipes.iter().map(|recipe| match recipe.program {
        Program::Test(name) => name,
    }))?;

    let init = Path::new(env!("CARGO_BIN_EXE_mesh-vm-init"));
    let mut programs = vec![("/init".to_owned(), initramfs::stripped(init, &folder)?)];
    let mut steps = Vec::new();
    for recipe in &recipes {
        let (name, mut command) = match recipe.program {
            Program::Test(name) => {
                let source = tests.get(name);
                let source = source.with_context(|| format!("cargo built no {name}"))?;
                let at = format!("/tests/{name}");
                programs.push((at.clone(), initramfs::stripped(source, &folder)?));
                (name, vec![at, "--test-threads=1".to_owned()])
            }
        };
        let arguments = recipe.arguments.iter().copied().chain(filter);
        command.extend(arguments.map(str::to_owned));
        steps.push(Step {
            name: name.to_owned(),
            command,
            environment: owned(recipe.environment),
            limit_seconds: recipe.limit_seconds,
        });
    }
    for name in RELEASE {
        programs.push((format!("{RELEASE_FOLDER}/{name}"), release.join(name)));
    }
    for (_, file) in programs.iter().chain([&(String::new(), object.clone())]) {
        ensure!(
            file.exists(),
            "no {}: `cargo xtask test vm` makes it",
            file.display()
        );
    }
    Ok(Built {
        steps,
        programs,
        object,
    })
}

/// Builds test targets of this package; their programs by their names.
///
/// For the whole workspace, as `cargo xtask test` does: of one package alone, cargo would unify
/// features differently and build the dependencies again.
fn cargo<'a>(tests: impl Iterator<Item = &'a str>) -> Result<BTreeMap<String, PathBuf>> {
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
