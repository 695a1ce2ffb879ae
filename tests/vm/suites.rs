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
    plan::Step,
    run::tool,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Suite {
    /// What the kernel can do, as docs/kernel-support.md says.
    Kernel,
}

impl Suite {
    pub(crate) fn all() -> Vec<Self> {
        Self::value_variants().to_vec()
    }

    /// The test binary of this package that it is.
    fn test(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
        }
    }

    /// Several times what it takes on an idle machine.
    fn limit_seconds(self) -> u64 {
        match self {
            Self::Kernel => 120,
        }
    }

    fn environment(self) -> BTreeMap<String, String> {
        match self {
            Self::Kernel => BTreeMap::new(),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Built {
    pub(crate) steps: Vec<Step>,
    /// Where it goes inside, and where it lies.
    programs: Vec<(String, PathBuf)>,
}

impl Built {
    pub(crate) fn place(&self, tree: &mut Tree) -> Result<()> {
        for (at, source) in &self.programs {
            tree.program(at, source)?;
        }
        Ok(())
    }
}

pub(crate) fn build(suites: &[Suite], filter: Option<&str>, cache: &Path) -> Result<Built> {
    let folder = cache.join("programs");
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let tests: Vec<_> = suites.iter().map(|suite| suite.test()).collect();
    let executables = cargo(&tests)?;
    let init = Path::new(env!("CARGO_BIN_EXE_mesh-vm-init"));

    let mut steps = Vec::new();
    let mut programs = vec![("/init".to_owned(), initramfs::stripped(init, &folder)?)];
    for suite in suites {
        let name = suite.test();
        let source = executables.get(name);
        let source = source.with_context(|| format!("cargo built no {name}"))?;
        let at = format!("/tests/{name}");
        programs.push((at.clone(), initramfs::stripped(source, &folder)?));
        let mut command = vec![at, "--test-threads=1".to_owned()];
        command.extend(filter.map(str::to_owned));
        steps.push(Step {
            name: name.to_owned(),
            command,
            environment: suite.environment(),
            limit_seconds: suite.limit_seconds(),
        });
    }
    Ok(Built { steps, programs })
}

/// Builds test targets of this package; their programs by their names.
///
/// For the whole workspace, as `cargo xtask test` does: of one package alone, cargo would unify
/// features differently and build the dependencies again.
fn cargo(tests: &[&str]) -> Result<BTreeMap<String, PathBuf>> {
    let mut command = tool(&env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()));
    command
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["test", "--no-run", "--workspace"])
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
