//! What is around the mesh: where this node may be reached, and what changed there.
//!
//! The kernel says only that something changed; what holds now is looked up again. Changes come in
//! flocks (a dozen for one address), which the monitor gathers. Only those of links are passed on at
//! once as well: guards cannot wait for the end of a flock.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use mesh_core::routes::is_reportable;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::eventloop::Told;
use crate::net::{self, Net};
use crate::stack::index_of;
use crate::wg::Interface;

/// Looks again after this long in any case: a monitor may lose messages under load.
const TICK: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_secs(2);
/// More than a host has; a coordinator takes no more from one node either.
const MOST_ENDPOINTS: usize = 32;

/// Reports until `stop`.
pub async fn run(
    interface: String,
    listen_port: u16,
    told: mpsc::Sender<Told>,
    around: watch::Sender<()>,
    links: watch::Sender<()>,
    stop: CancellationToken,
) {
    let everything = async {
        loop {
            if let Err(error) = watch(&interface, listen_port, &told, &around).await {
                tracing::warn!(error = format!("{error:#}"), "watch the underlay");
            }
            tokio::time::sleep(RETRY).await;
        }
    };
    let links = async {
        loop {
            if let Err(error) = watch_links(&links).await {
                tracing::warn!(error = format!("{error:#}"), "watch the links");
            }
            tokio::time::sleep(RETRY).await;
        }
    };
    let watched = async { tokio::join!(everything, links) };
    stop.run_until_cancelled(watched).await;
}

async fn watch_links(links: &watch::Sender<()>) -> anyhow::Result<()> {
    let mut changes = net::links()?;
    loop {
        links.send_replace(());
        if let Ok(changed) = tokio::time::timeout(TICK, changes.changed()).await {
            changed?;
        }
    }
}

async fn watch(
    interface: &str,
    listen_port: u16,
    told: &mpsc::Sender<Told>,
    around: &watch::Sender<()>,
) -> anyhow::Result<()> {
    let net = Net::new().await?;
    let mut monitor = net::monitor()?;
    let mut before = None;
    loop {
        let mesh = Interface {
            name: interface.to_owned(),
            index: index_of(interface).unwrap_or(0),
        };
        let prefixes = net
            .local_prefixes(&mesh)
            .await
            .context("list the underlay's addresses")?;
        let endpoints: BTreeSet<SocketAddr> = prefixes
            .iter()
            .map(|prefix| prefix.net.addr())
            .filter(|address| is_reportable(*address))
            .map(|address| SocketAddr::new(address, listen_port))
            .take(MOST_ENDPOINTS)
            .collect();
        let now = Some((endpoints.clone(), prefixes.clone()));
        if now != before {
            before = now;
            let report = Told::Underlay {
                endpoints,
                prefixes,
            };
            if told.send(report).await.is_err() {
                return Ok(());
            }
        }
        around.send_replace(());
        if let Ok(changed) = tokio::time::timeout(TICK, monitor.changed()).await {
            changed?;
        }
    }
}
