//! The command line: `serve`, and clients of the admin API.
//!
//! Exit codes: 0 done; 1 refused or failed; 2 the command line makes no sense; 3 no coordinator
//! answers at the admin socket.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod client;
mod db;
mod key;
mod node;
mod output;
mod policy;
mod serve;
mod status;
mod user;

use output::Output;

use crate::config::DEFAULT_SOCKET;

#[derive(Debug, Parser)]
#[command(
    name = "mesh-coordinator",
    version,
    about = "The control plane of the mesh",
    after_help = "Exit codes: 0 done, 1 refused or failed, 2 usage, 3 no coordinator answers."
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Runs the coordinator
    Serve(serve::Args),
    /// Shows the mesh, its join string and what is wrong with it
    Status(Admin),
    /// Lists and changes nodes
    #[command(subcommand)]
    Node(node::Verb),
    /// Lists and changes users
    #[command(subcommand)]
    User(user::Verb),
    /// Makes, lists and revokes pre-auth keys
    #[command(subcommand)]
    Key(key::Verb),
    /// Shows, checks and replaces the policy
    #[command(subcommand)]
    Policy(policy::Verb),
    /// Backs the database up, and restores it
    #[command(subcommand)]
    Db(db::Verb),
}

/// What every client verb takes.
#[derive(Debug, Clone, clap::Args)]
struct Admin {
    /// Unix socket of the coordinator's admin API
    #[arg(
        long,
        value_name = "PATH",
        env = "MESH_COORDINATOR_SOCKET",
        default_value = DEFAULT_SOCKET
    )]
    socket: PathBuf,
    /// Writes JSON
    #[arg(long)]
    json: bool,
}

/// How a verb ended when it did not end well.
#[derive(Debug)]
enum Failure {
    /// Refused or failed, with words.
    Failed(anyhow::Error),
    /// No coordinator answers.
    Unreachable(anyhow::Error),
    /// Said already what there was to say.
    Silent,
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        Self::Failed(anyhow::anyhow!("{}", output::printable(status.message())))
    }
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            output::error(&format!("mesh-coordinator: start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let done = runtime.block_on(run(cli.verb));
    // Whatever still runs has been told to stop and had its time.
    runtime.shutdown_timeout(std::time::Duration::from_millis(500));
    let (code, error) = match done {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Silent) => return ExitCode::FAILURE,
        Err(Failure::Failed(error)) => (ExitCode::FAILURE, error),
        Err(Failure::Unreachable(error)) => (ExitCode::from(3), error),
    };
    output::error(&format!("mesh-coordinator: {error:#}"));
    code
}

async fn run(verb: Verb) -> Result<(), Failure> {
    let output = Output;
    match verb {
        Verb::Serve(args) => Ok(serve::run(args).await?),
        Verb::Status(admin) => status::run(&admin, &output).await,
        Verb::Node(verb) => node::run(verb, &output).await,
        Verb::User(verb) => user::run(verb, &output).await,
        Verb::Key(verb) => key::run(verb, &output).await,
        Verb::Policy(verb) => policy::run(verb, &output).await,
        Verb::Db(verb) => db::run(verb, &output).await,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
