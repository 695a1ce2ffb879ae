//! A BPF file system for the length of one run.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// Mounted here, and gone with the value: programs and maps that only its pins held go too.
#[derive(Debug)]
pub(crate) struct Bpffs {
    folder: Option<tempfile::TempDir>,
}

impl Bpffs {
    pub(crate) fn mount() -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("mesh-bpf-")
            .tempdir()
            .context("make a folder")?;
        mount("bpf", folder.path(), "bpf", MountFlags::empty(), None).map_err(|error| {
            let remedy = if error == rustix::io::Errno::PERM {
                "run as root: `sudo -E env \"PATH=$PATH\" cargo xtask test ebpf`"
            } else {
                "this kernel needs CONFIG_BPF_SYSCALL"
            };
            anyhow::Error::new(io::Error::from(error))
                .context(format!("mount a BPF file system: {remedy}"))
        })?;
        Ok(Self {
            folder: Some(folder),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.as_ref().expect("only Drop takes it").path()
    }

    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        if let Some(folder) = self.folder.take() {
            // What cannot be unmounted must not be deleted through.
            if unmount(folder.path(), UnmountFlags::DETACH).is_err() {
                let _ = folder.keep();
            }
        }
    }
}
