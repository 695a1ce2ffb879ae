//! Running other programs, aloud.
//!
//! Every command is printed before it runs, so that whoever watches can repeat one by hand.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// The checkout's top folder.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask is a folder of the checkout")
}

/// Cargo's target folder: of the environment where set, as cargo itself has it.
pub(crate) fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// The cargo that runs us.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    // Set by the cargo that runs us. Build scripts (ring's) watch them, and everything above would
    // be built again whenever one changes between `cargo …` and `cargo xtask …`.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(name);
        }
    }
    command
}

/// Prints the command, runs it with our own terminal, fails if it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    announce(command);
    let status = command
        .status()
        .with_context(|| format!("start {}", command.get_program().display()))?;
    if !status.success() {
        bail!("`{}` failed ({status})", line(command));
    }
    Ok(())
}

/// Prints the command and becomes it: an interrupt reaches it alone, and whoever waits for us waits
/// until it has cleaned up.
pub(crate) fn become_it(command: &mut Command) -> Result<()> {
    announce(command);
    let error = command.exec();
    Err(error).with_context(|| format!("start {}", command.get_program().display()))
}

/// Standard output of a command that is expected to work; not announced, its work is ours.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("start {}", command.get_program().display()))?;
    if !output.status.success() {
        bail!("`{}` failed ({})", line(command), output.status);
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("read what `{}` printed", line(command)))
}

/// A named part of a longer task: says that it begins and how long it took.
pub(crate) fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("==> {name}");
    let begun = Instant::now();
    let value = work().with_context(|| name.to_owned())?;
    eprintln!("    {name}: {:.1} s", begun.elapsed().as_secs_f64());
    Ok(value)
}

pub(crate) fn announce(command: &Command) {
    eprintln!("$ {}", line(command));
}

/// As one would type it: the program by its name, arguments, and the variables that it is given.
fn line(command: &Command) -> String {
    let variables = command.get_envs().filter_map(|(name, value)| {
        let value = value?.to_string_lossy().replace('\x1f', " ");
        Some(quoted(&format!("{}={value}", name.to_string_lossy())))
    });
    let program = Path::new(command.get_program())
        .file_name()
        .unwrap_or_else(|| command.get_program());
    let arguments = command.get_args().map(|a| quoted(&a.to_string_lossy()));
    variables
        .chain([program.to_string_lossy().into_owned()])
        .chain(arguments)
        .collect::<Vec<_>>()
        .join(" ")
}

fn quoted(text: &str) -> String {
    if text.contains([' ', '\'', '"', '$', '*']) {
        format!("'{}'", text.replace('\'', "'\\''"))
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_one_would_type_it() {
        let mut command = Command::new("/usr/bin/cargo");
        command.env("RUSTC_BOOTSTRAP", "1").args(["build", "a b"]);
        assert_eq!(line(&command), "RUSTC_BOOTSTRAP=1 cargo build 'a b'");
    }
}
