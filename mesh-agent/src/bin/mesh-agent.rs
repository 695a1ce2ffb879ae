//! The node daemon.
#![expect(
    clippy::print_stderr,
    reason = "a start that fails is told before there is a log"
)]

use std::process::ExitCode;

use clap::Parser as _;
use mesh_agent::app::Agent;
use mesh_agent::config::{Args, Config, LogFormat};
use tracing_subscriber::EnvFilter;

/// The agent waits more than it computes; every thread costs memory on every node.
const WORKERS: usize = 2;

fn main() -> ExitCode {
    match start() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start() -> anyhow::Result<()> {
    let config = Config::load(Args::parse())?;
    log(&config)?;
    mesh_agent::harden()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(4)
        .enable_all()
        .build()?;
    runtime.block_on(async { Box::pin(Agent::build(config)).await?.run().await })
}

fn log(config: &Config) -> anyhow::Result<()> {
    // boringtun calls a peer that is away an error, every ninety seconds; status shows it better.
    // netlink-proto warns when we have not waited for an answer.
    let quiet = "boringtun=off,netlink_proto=error,aya=warn,h2=warn";
    let filter = EnvFilter::try_new(format!("{quiet},{}", config.log))
        .map_err(|error| anyhow::anyhow!("log {:?}: {error}", config.log))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let initialised = match config.log_format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    initialised.map_err(|error| anyhow::anyhow!("start the log: {error}"))
}
