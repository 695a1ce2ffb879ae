//! The eBPF object on an interface of one's choice, to watch it work.

use anyhow::{Result, bail};
use clap::Parser;

use crate::{build_ebpf, setup, shell};

#[derive(Debug, Parser)]
pub(crate) struct Options {
    /// The interface to attach to, real or scratch.
    #[arg(long)]
    iface: String,
}

impl Options {
    pub(crate) fn run(self) -> Result<()> {
        if !setup::is_root() {
            bail!(
                "loading BPF needs root. Run `sudo -E env \"PATH=$PATH\" cargo xtask build-and-load …`"
            );
        }
        let object = build_ebpf::build()?;
        shell::run(shell::cargo().args([
            "build",
            "--release",
            "--package",
            "mesh-tests",
            "--bin",
            "mesh-bpf-load",
        ]))?;
        shell::become_it(
            std::process::Command::new(shell::target_dir().join("release/mesh-bpf-load"))
                .args(["--iface", &self.iface, "--object"])
                .arg(object),
        )
    }
}
