//! `serve`: the daemon itself.

use std::io::IsTerminal as _;
use std::path::PathBuf;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::app;
use crate::config::{Config, LogFormat, Settings};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// TOML file with the settings below, `-` written as `_`
    #[arg(long, value_name = "FILE", env = "MESH_COORDINATOR_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

pub(super) async fn run(args: Args) -> anyhow::Result<()> {
    let settings = match &args.config {
        Some(path) => args.settings.over(Settings::read(path)?),
        None => args.settings,
    };
    start_logging(&settings)?;
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut running = app::start(Config::new(settings)?).await?;
    let failed = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        failed = running.failed() => Some(failed),
    };
    if let Some(failed) = failed {
        return Err(failed);
    }
    running.stop().await;
    Ok(())
}

fn start_logging(settings: &Settings) -> anyhow::Result<()> {
    let filter = settings.log.as_deref().unwrap_or("info");
    let filter = EnvFilter::try_new(filter).context("the log filter")?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let started = match settings.log_format.unwrap_or(LogFormat::Text) {
        LogFormat::Text => builder
            .with_ansi(std::io::stderr().is_terminal())
            .try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("start logging: {error}"))
}
