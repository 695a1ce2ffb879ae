//! Links: up, down, MTU, and which of them belong to the underlay.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Context as _;
use futures_util::TryStreamExt as _;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage,
};
use rtnetlink::{Handle, LinkUnspec};
use tracing::debug;

/// Names under which container and VM engines put bridges of their own, whose addresses no other
/// host can reach.
const CONTAINER_BRIDGES: [&str; 11] = [
    "docker", "br-", "virbr", "cni", "cali", "flannel", "podman", "lxcbr", "lxdbr", "incusbr",
    "kube",
];

#[derive(Debug)]
pub(super) struct Link {
    pub(super) mtu: u32,
    pub(super) up: bool,
}

pub(super) async fn observe(handle: &Handle, index: u32) -> anyhow::Result<Link> {
    let mut links = handle.link().get().match_index(index).execute();
    let link = links.try_next().await.context("read the interface")?;
    let link = link.context("the interface is gone")?;
    let mtu = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        });
    Ok(Link {
        mtu: mtu.unwrap_or(0),
        up: link.header.flags.contains(LinkFlags::Up),
    })
}

pub(super) async fn set_mtu(handle: &Handle, index: u32, mtu: u32) -> anyhow::Result<()> {
    set(handle, LinkUnspec::new_with_index(index).mtu(mtu).build()).await
}

pub(super) async fn set_up(handle: &Handle, index: u32, up: bool) -> anyhow::Result<()> {
    let link = LinkUnspec::new_with_index(index);
    if !up {
        return set(handle, link.down().build()).await;
    }
    // A TUN device would make itself a link-local address and ask for routers in a mesh that has
    // neither; the kernel's WireGuard does not.
    let quiet = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    let quiet = LinkUnspec::new_with_index(index)
        .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![quiet]));
    if let Err(error) = set(handle, quiet.build()).await {
        debug!(%error, "keep the interface's link-local address");
    }
    set(handle, link.up().build()).await
}

async fn set(handle: &Handle, message: LinkMessage) -> anyhow::Result<()> {
    handle.link().set(message).execute().await?;
    Ok(())
}

/// Whether `interface` may have IPv6 addresses.
pub(super) fn has_ipv6(interface: &str) -> bool {
    let path = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
    std::fs::read_to_string(path).is_ok_and(|value| value.trim() == "0")
}

/// Asked the same way.
pub(super) fn is_there(interface: &str) -> bool {
    Path::new("/proc/sys/net/ipv4/conf")
        .join(interface)
        .exists()
}

/// The interfaces that lead out of this host, by index, with their names.
pub(super) async fn underlay(handle: &Handle, mesh: u32) -> anyhow::Result<BTreeMap<u32, String>> {
    let links: Vec<LinkMessage> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .context("list the interfaces")?;
    let mut underlay = BTreeMap::new();
    for link in links {
        let flags = link.header.flags;
        let name = link
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name.clone()),
                _ => None,
            });
        let Some(name) = name else {
            continue;
        };
        let leads_out = link.header.index != mesh
            && flags.contains(LinkFlags::Up)
            && !flags.contains(LinkFlags::Loopback)
            && !is_container_bridge(&name);
        if leads_out {
            underlay.insert(link.header.index, name);
        }
    }
    Ok(underlay)
}

/// Names of the interfaces that are not the mesh's; loopback's is among them.
pub fn others(mesh: &str) -> anyhow::Result<BTreeSet<String>> {
    // The process's own network namespace, whatever is mounted on /sys.
    let table = std::fs::read_to_string("/proc/self/net/dev").context("list the interfaces")?;
    let others = table
        .lines()
        .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()))
        .filter(|name| name != mesh);
    Ok(others.collect())
}

fn is_container_bridge(name: &str) -> bool {
    CONTAINER_BRIDGES
        .iter()
        .any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bridges_of_containers_are_known_by_name() {
        for name in ["docker0", "br-0123456789ab", "virbr0", "cni0"] {
            assert!(is_container_bridge(name), "{name}");
        }
        for name in ["br0", "eth0", "bond0", "wlan0", "veth-a"] {
            assert!(!is_container_bridge(name), "{name}");
        }
    }
}
