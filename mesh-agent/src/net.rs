//! Links, addresses, routes and rules by rtnetlink.
//!
//! Level-triggered: [`Net::apply`] observes, asks `mesh_core::routes` for the steps and takes them,
//! so it may be told the same thing twice and repairs what others broke. Nothing here decides
//! what should stand; why the rules are what they are is written there.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::Context as _;
use mesh_core::routes::{
    Config, LocalPrefix, Op, Status, is_reportable, reconcile, unreachable_table,
};
use tokio::task::JoinHandle;
use tracing::{debug, warn};

use crate::wg::Interface;

mod addr;
mod link;
mod monitor;
mod route;
mod rule;

pub use link::others;
pub use monitor::{Links, Monitor, links, monitor};

use route::Way;

/// The actuator of the mesh interface's place in the host's routing.
#[derive(Debug)]
pub struct Net {
    handle: rtnetlink::Handle,
    connection: JoinHandle<()>,
}

impl Net {
    #[expect(
        clippy::unused_async,
        reason = "the socket must belong to a runtime, which an async caller proves"
    )]
    pub async fn new() -> anyhow::Result<Self> {
        // With strict checking the kernel dumps one table, not a backbone router's million routes.
        let (connection, handle, _) =
            rtnetlink::new_connection_with_strict_check().context("open a route netlink socket")?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
        })
    }

    /// Whether an interface carries packets.
    pub async fn is_up(&self, index: u32) -> anyhow::Result<bool> {
        Ok(link::observe(&self.handle, index).await?.up)
    }

    /// What stands for `interface`.
    pub async fn status(&self, interface: &Interface, table: u32) -> anyhow::Result<Status> {
        let link = link::observe(&self.handle, interface.index).await?;
        Ok(Status {
            addresses: addr::of_interface(&self.handle, interface.index).await?,
            mtu: link.mtu,
            up: link.up,
            routes: route::through(&self.handle, interface.index, table).await?,
            unreachable: route::unreachable(&self.handle, unreachable_table(table)).await?,
            rules: rule::ours(&self.handle).await?,
        })
    }

    /// Makes `config` so.
    pub async fn apply(&self, interface: &Interface, config: &Config) -> anyhow::Result<()> {
        let config = without_missing_family(interface, config);
        let status = self.status(interface, config.table).await?;
        for op in reconcile(&config, &status) {
            debug!(?op, interface = interface.name, "network step");
            self.take(interface.index, config.table, op)
                .await
                .with_context(|| format!("{op:?} on {}", interface.name))?;
        }
        Ok(())
    }

    /// Takes the interface down, at once and whatever else stands there.
    pub async fn close(&self, interface: &Interface) -> anyhow::Result<()> {
        link::set_up(&self.handle, interface.index, false)
            .await
            .with_context(|| format!("take {} down", interface.name))
    }

    async fn take(&self, index: u32, table: u32, op: Op) -> anyhow::Result<()> {
        let handle = &self.handle;
        match op {
            Op::SetMtu(mtu) => link::set_mtu(handle, index, mtu).await,
            Op::SetUp(up) => link::set_up(handle, index, up).await,
            Op::AddAddress(net) => addr::add(handle, index, net).await,
            Op::RemoveAddress(net) => addr::remove(handle, index, net).await,
            Op::AddRoute(net) => route::add(handle, Way::Through(index), table, net).await,
            Op::RemoveRoute(net) => route::remove(handle, Way::Through(index), table, net).await,
            Op::AddUnreachable(net) => {
                route::add(handle, Way::Nowhere, unreachable_table(table), net).await
            }
            Op::RemoveUnreachable(net) => {
                route::remove(handle, Way::Nowhere, unreachable_table(table), net).await
            }
            Op::AddRule(rule) => rule::add(handle, &rule).await,
            Op::RemoveRule(rule) => rule::remove(handle, &rule).await,
        }
    }

    /// The addresses at which the underlay may reach this node, `mesh` being our own interface.
    pub async fn local_addresses(&self, mesh: &Interface) -> anyhow::Result<BTreeSet<IpAddr>> {
        let prefixes = self.local_prefixes(mesh).await?;
        let addresses = prefixes.iter().map(|prefix| prefix.net.addr());
        Ok(addresses
            .filter(|address| is_reportable(*address))
            .collect())
    }

    /// The networks that this host is connected to, other than the mesh, loopback, and bridges
    /// behind which there are only containers.
    pub async fn local_prefixes(&self, mesh: &Interface) -> anyhow::Result<BTreeSet<LocalPrefix>> {
        let links = link::underlay(&self.handle, mesh.index).await?;
        let addresses = addr::all(&self.handle).await?;
        let prefixes = addresses.into_iter().filter_map(|(index, net)| {
            let interface = links.get(&index)?.clone();
            Some(LocalPrefix { interface, net })
        });
        Ok(prefixes.collect())
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// A host without IPv6 gets the IPv4 half, not an error.
fn without_missing_family(interface: &Interface, config: &Config) -> Config {
    if link::has_ipv6(&interface.name) {
        return config.clone();
    }
    let v4 = |nets: &BTreeSet<ipnet::IpNet>| {
        let nets = nets.iter().filter(|net| net.addr().is_ipv4());
        nets.copied().collect::<BTreeSet<_>>()
    };
    let (addresses, routes) = (v4(&config.addresses), v4(&config.routes));
    let only_mesh = v4(&config.only_mesh);
    if addresses.len() < config.addresses.len() && link::is_there(&interface.name) {
        warn!(
            interface = interface.name,
            "IPv6 is switched off on this host: the mesh has IPv4 only here"
        );
    }
    Config {
        addresses,
        routes,
        only_mesh,
        ..*config
    }
}

/// Whether `error` is the kernel's answer `errno`.
fn is_errno(error: &rtnetlink::Error, errno: i32) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(error) if error.raw_code() == -errno)
}
