//! The demo: a coordinator and four nodes on this machine, each in a network of its own.
//!
//! ```text
//!   coordinator      node       operator      sandbox      developer
//!        └─────────────┴────────────┴────────────┴────────────┘
//!                    underlay, a bridge of 198.51.100.0/24
//! ```
//! Everything runs from the release binaries, agents as an unprivileged user. Ctrl-C, or any other
//! end, removes every namespace, process, pin and mount.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command for a terminal"
)]

mod check;
mod expected;
mod show;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use mesh_tests::Lab;
use mesh_tests::mesh::{Backend, Mesh};

#[derive(Debug, Parser)]
#[command(about = "A coordinator and four nodes to look at")]
struct Options {
    /// Judge instead of waiting: one line per assertion, non-zero at the first that fails.
    #[arg(long)]
    check: bool,
    /// Which WireGuard the nodes use.
    #[arg(long, value_enum, default_value = "auto")]
    backend: Backend,
    /// Write the figures seen, as an array of `{"name", "value", "unit"}`.
    #[arg(long, value_name = "FILE", requires = "check")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let lab = Lab::of_release_build()?;
    println!("starting a coordinator and four nodes");
    let begun = Instant::now();
    let mut mesh = Mesh::of_roles(lab, mesh_core::policy::EXAMPLE, options.backend)
        .context("bring the mesh up")?;
    let up = begun.elapsed();
    println!("four nodes connected after {:.1} s\n", up.as_secs_f64());
    if options.check {
        judge(&mut mesh, up, options)
    } else {
        show::run(&mesh)
    }
}

fn judge(mesh: &mut Mesh, up: Duration, options: &Options) -> Result<()> {
    let figures = match check::run(mesh, up) {
        Ok(figures) => figures,
        Err(error) => {
            eprintln!("{}", mesh.logs());
            return Err(error);
        }
    };
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&figures).context("write the figures")?;
        std::fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))?;
    }
    Ok(())
}
