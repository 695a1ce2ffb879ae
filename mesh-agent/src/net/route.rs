//! Routes of the mesh's own tables: through its interface, and to nowhere without it.

use std::collections::BTreeSet;

use anyhow::Context as _;
use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use mesh_core::routes::PROTOCOL;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteScope, RouteType,
};
use rtnetlink::Handle;

use super::is_errno;

/// Where a route leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    /// The interface with this index.
    Through(u32),
    /// An error for whoever asks.
    Nowhere,
}

/// The prefixes that `table` sends through the interface `index`.
pub(super) async fn through(
    handle: &Handle,
    index: u32,
    table: u32,
) -> anyhow::Result<BTreeSet<IpNet>> {
    of_table(handle, Way::Through(index), table).await
}

/// The prefixes that `table` sends nowhere.
pub(super) async fn unreachable(handle: &Handle, table: u32) -> anyhow::Result<BTreeSet<IpNet>> {
    of_table(handle, Way::Nowhere, table).await
}

async fn of_table(handle: &Handle, way: Way, table: u32) -> anyhow::Result<BTreeSet<IpNet>> {
    let mut found = BTreeSet::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut filter = RouteMessage::default();
        filter.header.address_family = family;
        filter.attributes.push(RouteAttribute::Table(table));
        let routes: Result<Vec<RouteMessage>, _> =
            handle.route().get(filter).execute().try_collect().await;
        let routes = match routes {
            // A table comes into being with its first route.
            Err(error) if is_errno(&error, libc::ENOENT) => Vec::new(),
            routes => routes.context("list the mesh's routes")?,
        };
        found.extend(routes.iter().filter_map(|route| net(route, way, table)));
    }
    Ok(found)
}

pub(super) async fn add(handle: &Handle, way: Way, table: u32, net: IpNet) -> anyhow::Result<()> {
    let route = message(way, table, net);
    handle.route().add(route).replace().execute().await?;
    Ok(())
}

pub(super) async fn remove(
    handle: &Handle,
    way: Way,
    table: u32,
    net: IpNet,
) -> anyhow::Result<()> {
    match handle.route().del(message(way, table, net)).execute().await {
        Err(error) if is_errno(&error, libc::ESRCH) => Ok(()),
        result => Ok(result?),
    }
}

fn message(way: Way, table: u32, net: IpNet) -> RouteMessage {
    let mut route = RouteMessage::default();
    let header = &mut route.header;
    header.destination_prefix_length = net.prefix_len();
    header.protocol = PROTOCOL.into();
    header.kind = match way {
        Way::Through(_) => RouteType::Unicast,
        Way::Nowhere => RouteType::Unreachable,
    };
    let destination = match net.trunc() {
        IpNet::V4(net) => {
            header.address_family = AddressFamily::Inet;
            header.scope = match way {
                Way::Through(_) => RouteScope::Link,
                Way::Nowhere => RouteScope::Universe,
            };
            RouteAddress::Inet(net.addr())
        }
        IpNet::V6(net) => {
            header.address_family = AddressFamily::Inet6;
            RouteAddress::Inet6(net.addr())
        }
    };
    if net.prefix_len() > 0 {
        route
            .attributes
            .push(RouteAttribute::Destination(destination));
    }
    if let Way::Through(index) = way {
        route.attributes.push(RouteAttribute::Oif(index));
    }
    route.attributes.push(RouteAttribute::Table(table));
    route
}

/// The destination of `route` if it is one of `table` and leads `way`.
fn net(route: &RouteMessage, way: Way, table: u32) -> Option<IpNet> {
    let mut in_table = u32::from(route.header.table);
    let (mut through, mut destination) = (None, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Table(table) => in_table = *table,
            RouteAttribute::Oif(index) => through = Some(*index),
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => destination = Some((*ip).into()),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => {
                destination = Some((*ip).into());
            }
            _ => {}
        }
    }
    let leads = match way {
        Way::Through(index) => through == Some(index),
        // IPv6 shows the loopback interface for them.
        Way::Nowhere => route.header.kind == RouteType::Unreachable,
    };
    if in_table != table || !leads {
        return None;
    }
    let everything = match route.header.address_family {
        AddressFamily::Inet => [0; 4].into(),
        _ => [0; 16].into(),
    };
    let destination = destination.unwrap_or(everything);
    IpNet::new(destination, route.header.destination_prefix_length).ok()
}
