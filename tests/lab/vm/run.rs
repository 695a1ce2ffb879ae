//! Programs of the host that the virtual machine is built with.
//!
//! All come from Debian's own packages; a missing one is named together with its package.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

pub fn tool(program: &str) -> Command {
    let mut command = Command::new(program);
    // Its messages are read, not translated.
    command.env("LC_ALL", "C").stdin(Stdio::null());
    command
}

/// What the command prints; what it says on the way is shown only when it fails.
pub(super) fn output(command: &mut Command) -> Result<Vec<u8>> {
    let name = name(command);
    let output = command
        .output()
        .with_context(|| format!("run {name}: is its package installed? `cargo xtask setup`"))?;
    ensure!(
        output.status.success(),
        "{name}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    Ok(output.stdout)
}

pub(super) fn quietly(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

fn name(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let program = program.file_name().unwrap_or(program.as_os_str());
    program.to_string_lossy().into_owned()
}
