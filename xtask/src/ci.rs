//! Exactly what CI runs, in CI's order.
//!
//! Advisories are not here: they need a network, and what they say changes without a commit.

use anyhow::Result;
use clap::Parser;

use crate::{setup, shell, test, tidy};

#[derive(Debug, Parser)]
pub(crate) struct Options {
    /// Only what needs no root: everything but the tests.
    #[arg(long)]
    quick: bool,
}

impl Options {
    pub(crate) fn run(self) -> Result<()> {
        shell::step("tidy", tidy::check)?;
        shell::step("format", || {
            shell::run(shell::cargo().args(["fmt", "--all", "--check"]))
        })?;
        if !self.quick {
            shell::step("setup", || setup::prepare(setup::Purpose::Ci))?;
        }
        shell::step("clippy", || {
            shell::run(
                shell::cargo()
                    .args(["clippy", "--locked", "--workspace", "--all-targets"])
                    .args(["--", "-D", "warnings"]),
            )
        })?;
        shell::step("deny", || {
            shell::run(
                // Duplicate versions are a warning for whoever asks by hand, and a thousand lines here.
                shell::cargo()
                    .args(["deny", "--locked", "--log-level", "error", "check"])
                    .args(["bans", "licenses", "sources"]),
            )
        })?;
        if self.quick {
            return Ok(());
        }
        test::Options::everything().run()
    }
}
