//! `db`: backup while the coordinator runs, restore while it does not.

use std::path::PathBuf;

use anyhow::Context as _;
use mesh_api::v1;
use serde_json::json;

use super::output::Output;
use super::{Admin, Failure, client};
use crate::clock::Clock;
use crate::config::DEFAULT_STATE_DIR;
use crate::state_dir::StateDir;
use crate::store::{OpenError, restore};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Verb {
    /// Writes a consistent copy of the running coordinator's database
    Backup {
        /// File to make; it must not exist
        file: PathBuf,
        #[command(flatten)]
        admin: Admin,
    },
    /// Puts a backup in the database's place and starts a new epoch; stop the coordinator first
    Restore {
        file: PathBuf,
        /// The coordinator's state directory
        #[arg(
            long,
            value_name = "DIR",
            env = "MESH_COORDINATOR_STATE_DIR",
            default_value = DEFAULT_STATE_DIR
        )]
        state_dir: PathBuf,
        /// Writes JSON
        #[arg(long)]
        json: bool,
    },
}

pub(super) async fn run(verb: Verb, output: &Output) -> Result<(), Failure> {
    match verb {
        Verb::Backup { file, admin } => backup(file, &admin, output).await,
        Verb::Restore {
            file,
            state_dir,
            json,
        } => {
            let mut state = StateDir::open(&state_dir)?;
            let now = Clock::start().now();
            let restored = restore::restore(&mut state, &file, now).await;
            let restored = restored.map_err(|error| match error.downcast::<OpenError>() {
                // Its restore hint would send the operator here again.
                Ok(error) => anyhow::anyhow!("{error}; nothing was changed, try another backup"),
                Err(error) => error,
            })?;
            let aside = restored.moved_aside.map(|path| path.display().to_string());
            if json {
                output.json(&json!({
                    "epoch": restored.epoch.0,
                    "generation": restored.generation.0,
                    "nodes": restored.nodes,
                    "moved_aside": aside,
                }));
                return Ok(());
            }
            output.line(&format!(
                "restored {} node(s) of generation {}, now epoch {}",
                restored.nodes, restored.generation, restored.epoch
            ));
            if let Some(aside) = aside {
                output.line(&format!("what was there before is in {aside}"));
            }
            output.line("start the coordinator again with `mesh-coordinator serve`");
            Ok(())
        }
    }
}

async fn backup(file: PathBuf, admin: &Admin, output: &Output) -> Result<(), Failure> {
    let path = std::path::absolute(&file).context("find the current directory")?;
    let text = path.to_str().context("the path of a backup is UTF-8")?;
    let request = v1::BackupRequest {
        path: text.to_owned(),
    };
    let mut client = client::connect(admin).await?;
    let made = client.backup(request).await?.into_inner();
    if admin.json {
        output.json(&json!({
            "path": text,
            "bytes": made.bytes,
            "generation": made.generation,
        }));
    } else {
        output.line(&format!(
            "wrote generation {} to {text} ({} bytes)",
            made.generation, made.bytes
        ));
        output
            .line("the coordinator's key is not in it: keep a copy of coordinator.key apart, once");
    }
    Ok(())
}
