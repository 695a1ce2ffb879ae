//! Addresses of interfaces.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::Context as _;
use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage,
};
use rtnetlink::Handle;

use super::is_errno;

/// The addresses of one interface, link-local ones left out: they are the kernel's own affair.
pub(super) async fn of_interface(handle: &Handle, index: u32) -> anyhow::Result<BTreeSet<IpNet>> {
    let addresses = messages(handle).await?;
    let ours = addresses
        .iter()
        .filter(|message| message.header.index == index)
        .filter_map(net);
    Ok(ours.filter(|net| !is_link_local(net.addr())).collect())
}

/// Every address that can be used now, with its interface.
pub(super) async fn all(handle: &Handle) -> anyhow::Result<BTreeSet<(u32, IpNet)>> {
    let addresses = messages(handle).await?;
    let usable = addresses.iter().filter(|message| is_usable(message));
    Ok(usable
        .filter_map(|message| Some((message.header.index, net(message)?)))
        .collect())
}

pub(super) async fn add(handle: &Handle, index: u32, net: IpNet) -> anyhow::Result<()> {
    let mut request = handle
        .address()
        .add(index, net.addr(), net.prefix_len())
        .replace();
    if net.addr().is_ipv6() {
        // Nobody on the mesh answers neighbour solicitations; the address is ours by assignment.
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
    }
    request.execute().await?;
    Ok(())
}

pub(super) async fn remove(handle: &Handle, index: u32, net: IpNet) -> anyhow::Result<()> {
    let addresses = messages(handle).await?;
    let found = addresses
        .into_iter()
        .find(|message| message.header.index == index && self::net(message) == Some(net));
    let Some(message) = found else {
        return Ok(());
    };
    match handle.address().del(message).execute().await {
        Err(error) if is_errno(&error, libc::EADDRNOTAVAIL) => Ok(()),
        result => Ok(result?),
    }
}

async fn messages(handle: &Handle) -> anyhow::Result<Vec<AddressMessage>> {
    let addresses = handle.address().get().execute();
    addresses.try_collect().await.context("list the addresses")
}

fn net(message: &AddressMessage) -> Option<IpNet> {
    let (mut local, mut address) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            _ => {}
        }
    }
    // On a point-to-point link ADDRESS is the other end.
    IpNet::new(local.or(address)?, message.header.prefix_len).ok()
}

/// Neither still being checked for duplicates nor about to go.
fn is_usable(message: &AddressMessage) -> bool {
    let flags = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            AddressAttribute::Flags(flags) => Some(*flags),
            _ => None,
        });
    let bad = AddressFlags::Tentative | AddressFlags::Dadfailed | AddressFlags::Deprecated;
    !flags.is_some_and(|flags| flags.intersects(bad))
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}
