//! The rules of the house, as checks with helpful messages.
//!
//! A rule is here when no compiler, linter or formatter can hold it. Each finding names the file,
//! the rule and the reason, because the reader is somebody who did not know the rule.

pub(crate) mod imports;
pub(crate) mod protocol;
mod reasons;
mod sources;

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Parser;

use crate::shell;

#[derive(Debug, Parser)]
pub(crate) struct Options {}

impl Options {
    pub(crate) fn run(self) -> Result<()> {
        check()
    }
}

pub(crate) fn check() -> Result<()> {
    let files = tracked_files()?;
    let mut findings = imports::findings()?;
    findings.extend(sources::findings(&files));
    findings.extend(reasons::findings(&files));
    findings.extend(protocol::findings(shell::root())?);
    if findings.is_empty() {
        return Ok(());
    }
    for finding in &findings {
        eprintln!("{finding}");
    }
    bail!("{} rule(s) of the house broken", findings.len());
}

/// Text files under version control, or about to be, with their content.
fn tracked_files() -> Result<Vec<File>> {
    let listing = shell::output(Command::new("git").current_dir(shell::root()).args([
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]))?;
    let mut files = Vec::new();
    for path in listing.split_terminator('\0') {
        let full = shell::root().join(path);
        // A file that is tracked and deleted, and a symbolic link's target, are not ours to read.
        if !full.symlink_metadata().is_ok_and(|meta| meta.is_file()) {
            continue;
        }
        let bytes = std::fs::read(&full).with_context(|| format!("read {path}"))?;
        if let Ok(text) = String::from_utf8(bytes) {
            files.push(File {
                path: path.into(),
                text,
            });
        }
    }
    Ok(files)
}

/// A file by its path from the checkout's top.
#[derive(Debug)]
struct File {
    path: PathBuf,
    text: String,
}
