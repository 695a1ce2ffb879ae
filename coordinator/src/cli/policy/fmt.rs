//! `policy fmt`: as gofmt and hujsonfmt are used.
//!
//! To standard output unless told otherwise; `-w` changes files, and only those that differ, in one
//! step each, so that nobody ever reads half a policy.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use mesh_core::policy;

use super::read;
use crate::cli::Failure;
use crate::cli::output::{self, Output};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// HuJSON; `-` reads standard input
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Writes the result back to the files
    #[arg(short, long)]
    write: bool,
    /// Changes nothing, names the files that are not laid out so, and exits with 1 if there are any
    #[arg(long, conflicts_with = "write")]
    check: bool,
}

pub(super) fn run(args: &Args, output: &Output) -> Result<(), Failure> {
    let mut refused = false;
    for file in &args.files {
        let stdin = file == Path::new("-");
        if stdin && args.write {
            return Err(anyhow!("standard input cannot be written back: leave -w out").into());
        }
        let text = read(file)?;
        let formatted = match policy::format(&text) {
            Ok(formatted) => formatted,
            Err(problems) => {
                let problems = problems.in_file(&file.display().to_string());
                output::error(&problems.to_string());
                refused = true;
                continue;
            }
        };
        if !args.check && !args.write {
            output.raw(&formatted);
        } else if formatted != text && args.check {
            output.line(&file.display().to_string());
            refused = true;
        } else if formatted != text {
            replace(file, &formatted).with_context(|| format!("write {}", file.display()))?;
        }
    }
    match refused {
        true => Err(Failure::Silent),
        false => Ok(()),
    }
}

/// Writes beside the file and moves it into its place, mode and all. A link stays one.
fn replace(file: &Path, text: &str) -> anyhow::Result<()> {
    let place = fs::canonicalize(file)?;
    let mut name = place.file_name().unwrap_or_default().to_owned();
    name.push(format!(".fmt-{}", std::process::id()));
    let beside = place.with_file_name(name);
    let written = (|| {
        let mut out = fs::File::create_new(&beside)?;
        out.set_permissions(fs::metadata(&place)?.permissions())?;
        out.write_all(text.as_bytes())?;
        out.sync_all()?;
        fs::rename(&beside, &place)
    })();
    if written.is_err() {
        drop(fs::remove_file(&beside));
    }
    Ok(written?)
}
