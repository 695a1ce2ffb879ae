//! The kernel's WireGuard device, by generic netlink.
//!
//! It outlives the agent: an interface of our name is adopted with its peers and their sessions,
//! and traffic never notices a restart. A netlink attribute holds 64 KiB at most, so long lists
//! of peers go in several messages, and come back in several, a peer perhaps cut in two.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use futures_util::{StreamExt as _, TryStreamExt as _};
use genetlink::GenetlinkHandle;
use ipnet::IpNet;
use mesh_core::key::NodePublic;
use mesh_core::wireguard::{DeviceOp, DeviceStatus, PeerStatus};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_generic::GenlMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_wireguard::{
    WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd, WireguardMessage, WireguardPeer,
    WireguardPeerAttribute,
};
use rtnetlink::LinkWireguard;
use tokio::task::JoinHandle;
use tracing::debug;

use super::{Interface, OpenOptions};

mod encode;

/// How often a dump is repeated that the kernel calls inconsistent.
const DUMP_ATTEMPTS: u32 = 10;

/// A WireGuard interface of the kernel.
#[derive(Debug)]
pub struct Device {
    interface: Interface,
    netlink: GenetlinkHandle,
    connection: JoinHandle<()>,
    /// The endpoints that this process has written.
    written: Mutex<BTreeMap<NodePublic, SocketAddr>>,
}

/// Whether this kernel has WireGuard; loads its module if there is one.
pub async fn is_supported() -> bool {
    let Ok((connection, handle, _)) = genetlink::new_connection() else {
        return false;
    };
    let connection = tokio::spawn(connection);
    let family = handle.resolve_family::<WireguardMessage>().await;
    connection.abort();
    family.is_ok()
}

impl Device {
    /// Creates the interface, down, or adopts the one that has the name.
    pub async fn open(options: &OpenOptions) -> anyhow::Result<Self> {
        let index = interface(&options.name).await?;
        let (connection, netlink, _) =
            genetlink::new_connection().context("open a generic netlink socket")?;
        let device = Self {
            interface: Interface {
                name: options.name.clone(),
                index,
            },
            netlink,
            connection: tokio::spawn(connection),
            written: Mutex::default(),
        };
        // Says at once when the family is missing or the capability is.
        device
            .status()
            .await
            .context("ask the kernel's WireGuard: this needs the module and CAP_NET_ADMIN")?;
        Ok(device)
    }

    pub fn interface(&self) -> &Interface {
        &self.interface
    }

    pub async fn status(&self) -> anyhow::Result<DeviceStatus> {
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(mut status) = self.dump().await? {
                let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
                for (key, peer) in &mut status.peers {
                    peer.written_endpoint = written.get(key).copied();
                }
                return Ok(status);
            }
        }
        bail!("the device changed during each of {DUMP_ATTEMPTS} dumps");
    }

    /// One dump, or `None` if the device changed meanwhile.
    async fn dump(&self) -> anyhow::Result<Option<DeviceStatus>> {
        let index = WireguardAttribute::IfIndex(self.interface.index);
        let mut request = message(WireguardCmd::GetDevice, vec![index]);
        request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let mut answers = self.netlink.clone().request(request).await?;
        let mut status = DeviceStatus::default();
        while let Some(answer) = answers.next().await {
            let answer = answer.context("read an answer of the kernel")?;
            if answer.header.flags & NLM_F_DUMP_INTR != 0 {
                return Ok(None);
            }
            match answer.payload {
                NetlinkPayload::InnerMessage(answer) => {
                    take(&mut status, answer.payload.attributes);
                }
                NetlinkPayload::Error(error) if error.code.is_some() => {
                    return Err(error.to_io()).context("read the WireGuard device");
                }
                _ => {}
            }
        }
        Ok(Some(status))
    }

    pub async fn apply(&self, ops: &[DeviceOp]) -> anyhow::Result<()> {
        for attributes in encode::messages(ops) {
            let device = std::iter::once(WireguardAttribute::IfIndex(self.interface.index));
            self.set(device.chain(attributes).collect()).await?;
        }
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        for op in ops {
            match op {
                DeviceOp::AddPeer(key, config) => {
                    written.remove(key);
                    written.extend(config.endpoint.map(|endpoint| (*key, endpoint)));
                }
                DeviceOp::SetEndpoint(key, endpoint) => {
                    written.insert(*key, *endpoint);
                }
                DeviceOp::RemovePeer(key) => {
                    written.remove(key);
                }
                DeviceOp::SetKey(_)
                | DeviceOp::SetListenPort(_)
                | DeviceOp::SetFwmark(_)
                | DeviceOp::SetKeepalive(..)
                | DeviceOp::AddAllowedIps(..)
                | DeviceOp::ReplaceAllowedIps(..) => {}
            }
        }
        Ok(())
    }

    async fn set(&self, attributes: Vec<WireguardAttribute>) -> anyhow::Result<()> {
        let mut request = message(WireguardCmd::SetDevice, attributes);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
        let mut answers = self.netlink.clone().request(request).await?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer?.payload
                && error.code.is_some()
            {
                return Err(error.to_io()).context("configure the kernel's WireGuard");
            }
        }
        Ok(())
    }

    /// Removes the interface; an agent that is merely stopped leaves it.
    pub async fn remove(self) -> anyhow::Result<()> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let connection = tokio::spawn(connection);
        let removed = handle.link().del(self.interface.index).execute().await;
        connection.abort();
        removed.context("remove the WireGuard interface")
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// The index of the WireGuard interface `name`, which is created if there is none.
async fn interface(name: &str) -> anyhow::Result<u32> {
    let (connection, handle, _) =
        rtnetlink::new_connection().context("open a route netlink socket")?;
    let connection = tokio::spawn(connection);
    let found = find_or_create(&handle, name).await;
    connection.abort();
    found
}

async fn find_or_create(handle: &rtnetlink::Handle, name: &str) -> anyhow::Result<u32> {
    if let Some(link) = find(handle, name).await? {
        if kind(&link) != Some(&InfoKind::Wireguard) {
            bail!("an interface {name} exists and is not WireGuard's: remove it or choose a name");
        }
        debug!(interface = name, "adopt the WireGuard interface");
        return Ok(link.header.index);
    }
    handle
        .link()
        .add(LinkWireguard::new(name).build())
        .execute()
        .await
        .with_context(|| format!("create the WireGuard interface {name}"))?;
    let link = find(handle, name).await?;
    Ok(link.context("find the new interface")?.header.index)
}

async fn find(handle: &rtnetlink::Handle, name: &str) -> anyhow::Result<Option<LinkMessage>> {
    let mut links = handle.link().get().match_name(name).execute();
    match links.try_next().await {
        Ok(link) => Ok(link),
        Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -libc::ENODEV => Ok(None),
        Err(error) => Err(error).with_context(|| format!("look {name} up")),
    }
}

fn kind(link: &LinkMessage) -> Option<&InfoKind> {
    let infos = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => Some(infos),
            _ => None,
        })?;
    infos.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    })
}

fn message(
    cmd: WireguardCmd,
    attributes: Vec<WireguardAttribute>,
) -> NetlinkMessage<GenlMessage<WireguardMessage>> {
    NetlinkMessage::from(GenlMessage::from_payload(WireguardMessage {
        cmd,
        attributes,
    }))
}

/// Adds a part of a dump to what is known.
fn take(status: &mut DeviceStatus, attributes: Vec<WireguardAttribute>) {
    for attribute in attributes {
        match attribute {
            WireguardAttribute::PublicKey(key) => status.key = Some(NodePublic(key)),
            WireguardAttribute::ListenPort(port) => status.listen_port = port,
            WireguardAttribute::Fwmark(mark) => status.fwmark = mark,
            WireguardAttribute::Peers(peers) => {
                for peer in peers {
                    take_peer(status, peer);
                }
            }
            _ => {}
        }
    }
}

fn take_peer(status: &mut DeviceStatus, peer: WireguardPeer) {
    let key = peer.0.iter().find_map(|attribute| match attribute {
        WireguardPeerAttribute::PublicKey(key) => Some(NodePublic(*key)),
        _ => None,
    });
    let Some(key) = key else {
        return;
    };
    // A peer whose allowed IPs did not fit comes again with the rest of them.
    let known = status.peers.entry(key).or_default();
    for attribute in peer.0 {
        take_peer_attribute(known, attribute);
    }
}

fn take_peer_attribute(peer: &mut PeerStatus, attribute: WireguardPeerAttribute) {
    match attribute {
        WireguardPeerAttribute::Endpoint(endpoint) => peer.endpoint = Some(endpoint),
        WireguardPeerAttribute::PersistentKeepalive(seconds) => {
            peer.keepalive = Some(seconds).filter(|s| *s != 0);
        }
        WireguardPeerAttribute::LastHandshake(at) => {
            peer.handshake_age = age(at.seconds, at.nano_seconds);
        }
        WireguardPeerAttribute::RxBytes(bytes) => peer.rx_bytes = bytes,
        WireguardPeerAttribute::TxBytes(bytes) => peer.tx_bytes = bytes,
        WireguardPeerAttribute::AllowedIps(ips) => {
            let nets: BTreeSet<IpNet> = ips.iter().filter_map(|ip| net(&ip.0)).collect();
            peer.allowed_ips.extend(nets);
        }
        _ => {}
    }
}

/// The kernel gives the wall clock's time of the handshake, zero if there was none.
fn age(seconds: i64, nanos: i64) -> Option<Duration> {
    let at = Duration::new(seconds.try_into().ok()?, nanos.try_into().ok()?);
    if at.is_zero() {
        return None;
    }
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    Some(now.saturating_sub(at))
}

fn net(attributes: &[WireguardAllowedIpAttr]) -> Option<IpNet> {
    let (mut address, mut length) = (None, None);
    for attribute in attributes {
        match attribute {
            WireguardAllowedIpAttr::IpAddr(ip) => address = Some(*ip),
            WireguardAllowedIpAttr::Cidr(cidr) => length = Some(*cidr),
            _ => {}
        }
    }
    IpNet::new(address?, length?).ok()
}
