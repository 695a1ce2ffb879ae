//! What compiles for the kernel.
//!
//! Two toolchains build the same object and the first that is there is taken: Debian's rustc-web,
//! which brings a ready-made `core` for the target, or rustup's nightly with its sources. The
//! hard part is the flags: an inherited CARGO_ENCODED_RUSTFLAGS replaces ours and silently costs
//! the BTF, so ours are set in that very variable.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::shell;

pub(crate) const TARGET: &str = "bpfel-unknown-none";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Toolchain {
    /// Debian's rustc with `libstd-rust-web-dev-bpf`.
    Debian,
    /// rustup's nightly, which builds `core` itself.
    Nightly,
}

impl Toolchain {
    pub(crate) fn find() -> Option<Self> {
        if Path::new("/usr/bin/rustc").exists()
            && Path::new("/usr/lib/rustlib")
                .join(TARGET)
                .join("lib")
                .exists()
        {
            return Some(Self::Debian);
        }
        let sysroot = Command::new("rustup")
            .args(["run", "nightly", "rustc", "--print", "sysroot"])
            .output()
            .ok()
            .filter(|output| output.status.success())?;
        let sysroot = PathBuf::from(String::from_utf8(sysroot.stdout).ok()?.trim());
        sysroot
            .join("lib/rustlib/src/rust/library/core")
            .exists()
            .then_some(Self::Nightly)
    }

    /// `cargo build` with this toolchain and our flags.
    pub(crate) fn cargo(self) -> Command {
        let mut command = match self {
            Self::Debian => {
                let mut command = shell::cargo();
                command
                    .env("RUSTC", "/usr/bin/rustc")
                    .env("RUSTC_BOOTSTRAP", "1");
                command.arg("build");
                command
            }
            Self::Nightly => {
                let mut command = Command::new("rustup");
                command
                    .current_dir(shell::root())
                    .env_remove("RUSTC")
                    .env_remove("CARGO")
                    .env_remove("RUSTUP_TOOLCHAIN")
                    .args(["run", "nightly", "cargo", "build", "-Zbuild-std=core"]);
                command
            }
        };
        // Arithmetic of 32 bits and jumps on it (Linux 5.12), without which every word is shifted into 64 and
        // back: a tenth of what an established packet costs.
        let flags = [
            "-Clinker=bpf-linker",
            "-Clink-arg=--btf",
            "-Ctarget-cpu=v3",
            "-Cdebuginfo=2",
        ];
        command
            .env_remove("RUSTFLAGS")
            .env_remove("RUSTC_WRAPPER")
            .env_remove("RUSTC_WORKSPACE_WRAPPER")
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        command
    }
}
