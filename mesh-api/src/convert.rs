//! The door between generated messages and mesh-core's nouns.
//!
//! Names come from a coordinator that may be hostile, so a DNS domain or a node name that does not
//! parse refuses the whole message rather than being repaired.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh_core::key::{InvalidKey, NodePublic};
use mesh_core::netmap::{Me, Peer};
use mesh_core::node::{
    Addresses, HostInfo, InvalidName, MeshId, Name, NodeId, Tag, UnixTime, UserName,
};
use mesh_core::world::{Mesh, Pools};

use crate::v1;

/// A message that no honest sender makes, and the field that gave it away.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    #[error("field `{0}` is missing")]
    Missing(&'static str),
    #[error("field `{0}` is not an IP address or prefix")]
    Address(&'static str),
    #[error("field `{0}` is out of range")]
    Range(&'static str),
    #[error("field `{field}` is malformed")]
    Key {
        field: &'static str,
        #[source]
        source: InvalidKey,
    },
    #[error("a name is malformed")]
    Name(#[from] InvalidName),
    #[error("the mesh domain is not a DNS name")]
    Domain,
    #[error("field `{0}` holds the same key twice")]
    Duplicate(&'static str),
    #[error("not a protobuf message of this kind")]
    Encoding,
}

/// What a host may tell about itself, in bytes for each field.
const HOST_FIELD_MAX: usize = 256;

// === addresses ===

pub fn address(bytes: &[u8], field: &'static str) -> Result<IpAddr, Invalid> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(v4.into());
    }
    <[u8; 16]>::try_from(bytes)
        .map(IpAddr::from)
        .map_err(|_| Invalid::Address(field))
}

pub fn address_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn v4(bytes: &[u8], field: &'static str) -> Result<Ipv4Addr, Invalid> {
    <[u8; 4]>::try_from(bytes)
        .map(Ipv4Addr::from)
        .map_err(|_| Invalid::Address(field))
}

fn v6(bytes: &[u8], field: &'static str) -> Result<Ipv6Addr, Invalid> {
    <[u8; 16]>::try_from(bytes)
        .map(Ipv6Addr::from)
        .map_err(|_| Invalid::Address(field))
}

fn addresses(four: &[u8], six: &[u8]) -> Result<Addresses, Invalid> {
    Ok(Addresses {
        v4: v4(four, "v4")?,
        v6: v6(six, "v6")?,
    })
}

impl From<IpNet> for v1::Prefix {
    fn from(net: IpNet) -> Self {
        Self {
            address: address_bytes(net.addr()),
            length: u32::from(net.prefix_len()),
        }
    }
}

/// Host bits must be zero: one prefix has one spelling.
impl TryFrom<&v1::Prefix> for IpNet {
    type Error = Invalid;

    fn try_from(prefix: &v1::Prefix) -> Result<Self, Invalid> {
        let address = address(&prefix.address, "prefix")?;
        let length = u8::try_from(prefix.length).map_err(|_| Invalid::Range("prefix length"))?;
        let net = Self::new(address, length).map_err(|_| Invalid::Range("prefix length"))?;
        if net.trunc() == net {
            Ok(net)
        } else {
            Err(Invalid::Address("prefix"))
        }
    }
}

impl From<SocketAddr> for v1::Endpoint {
    fn from(endpoint: SocketAddr) -> Self {
        Self {
            address: address_bytes(endpoint.ip()),
            port: u32::from(endpoint.port()),
        }
    }
}

impl TryFrom<&v1::Endpoint> for SocketAddr {
    type Error = Invalid;

    fn try_from(endpoint: &v1::Endpoint) -> Result<Self, Invalid> {
        let address = address(&endpoint.address, "endpoint")?;
        match u16::try_from(endpoint.port) {
            Ok(port) if port != 0 => Ok(Self::new(address, port)),
            _ => Err(Invalid::Range("endpoint port")),
        }
    }
}

/// `From` for every item of an iterator.
pub(crate) fn wire<T, U: From<T>>(items: impl IntoIterator<Item = T>) -> Vec<U> {
    items.into_iter().map(U::from).collect()
}

/// `TryFrom` for every item of a repeated field, which must hold none twice.
pub fn set<'a, T, U>(items: &'a [T], field: &'static str) -> Result<BTreeSet<U>, Invalid>
where
    U: TryFrom<&'a T, Error = Invalid> + Ord,
{
    let set = items
        .iter()
        .map(U::try_from)
        .collect::<Result<BTreeSet<U>, Invalid>>()?;
    if set.len() == items.len() {
        Ok(set)
    } else {
        Err(Invalid::Duplicate(field))
    }
}

// === nouns ===

pub fn node_public(bytes: &[u8]) -> Result<NodePublic, Invalid> {
    NodePublic::try_from(bytes).map_err(|source| Invalid::Key {
        field: "key",
        source,
    })
}

fn tags(texts: &[String]) -> Result<BTreeSet<Tag>, Invalid> {
    texts
        .iter()
        .map(|text| Tag::parse(text).map_err(Invalid::Name))
        .collect()
}

fn user(text: Option<&String>) -> Result<Option<UserName>, Invalid> {
    text.map(|text| UserName::parse(text))
        .transpose()
        .map_err(Invalid::Name)
}

/// A domain of one or more labels, lower case, 200 bytes at most so that a node's label fits before it.
pub fn domain(text: &str) -> Result<String, Invalid> {
    let fits = text.len() <= 200 && text.split('.').all(|label| Name::parse(label).is_ok());
    if fits {
        Ok(text.to_owned())
    } else {
        Err(Invalid::Domain)
    }
}

impl From<&Mesh> for v1::Mesh {
    fn from(mesh: &Mesh) -> Self {
        Self {
            id: mesh.id.0.to_vec(),
            domain: mesh.domain.clone(),
            pool_v4: Some(IpNet::from(mesh.pools.v4).into()),
            pool_v6: Some(IpNet::from(mesh.pools.v6).into()),
        }
    }
}

impl TryFrom<&v1::Mesh> for Mesh {
    type Error = Invalid;

    fn try_from(mesh: &v1::Mesh) -> Result<Self, Invalid> {
        let id = <[u8; 16]>::try_from(mesh.id.as_slice()).map_err(|_| Invalid::Range("mesh id"))?;
        Ok(Self {
            id: MeshId(id),
            domain: domain(&mesh.domain)?,
            pools: Pools {
                v4: pool_v4(mesh.pool_v4.as_ref())?,
                v6: pool_v6(mesh.pool_v6.as_ref())?,
            },
        })
    }
}

fn pool_v4(prefix: Option<&v1::Prefix>) -> Result<Ipv4Net, Invalid> {
    match IpNet::try_from(prefix.ok_or(Invalid::Missing("pool_v4"))?)? {
        IpNet::V4(net) if net.prefix_len() > 0 => Ok(net),
        _ => Err(Invalid::Range("pool_v4")),
    }
}

fn pool_v6(prefix: Option<&v1::Prefix>) -> Result<Ipv6Net, Invalid> {
    match IpNet::try_from(prefix.ok_or(Invalid::Missing("pool_v6"))?)? {
        IpNet::V6(net) if net.prefix_len() > 0 => Ok(net),
        _ => Err(Invalid::Range("pool_v6")),
    }
}

impl From<&HostInfo> for v1::HostInfo {
    fn from(host: &HostInfo) -> Self {
        let HostInfo {
            hostname,
            os,
            os_version,
            kernel,
            agent_version,
            backend,
        } = host.clone();
        Self {
            hostname,
            os,
            os_version,
            kernel,
            agent_version,
            backend,
        }
    }
}

/// Never fails: text that a host says of itself is cut and made printable, not believed.
impl From<&v1::HostInfo> for HostInfo {
    fn from(host: &v1::HostInfo) -> Self {
        Self {
            hostname: printable(&host.hostname),
            os: printable(&host.os),
            os_version: printable(&host.os_version),
            kernel: printable(&host.kernel),
            agent_version: printable(&host.agent_version),
            backend: printable(&host.backend),
        }
    }
}

fn printable(text: &str) -> String {
    let mut safe: String = text
        .chars()
        .filter(|c| !c.is_control())
        .take(HOST_FIELD_MAX)
        .collect();
    while safe.len() > HOST_FIELD_MAX {
        safe.pop();
    }
    safe
}

impl From<&Me> for v1::Me {
    fn from(me: &Me) -> Self {
        Self {
            id: me.id.0,
            name: me.name.to_string(),
            key: me.key.0.to_vec(),
            v4: me.addresses.v4.octets().to_vec(),
            v6: me.addresses.v6.octets().to_vec(),
            tags: me.tags.iter().map(Tag::to_string).collect(),
            user: me.user.as_ref().map(UserName::to_string),
            expires: me.expires.map(|at| at.0),
            expired: me.expired,
        }
    }
}

impl TryFrom<&v1::Me> for Me {
    type Error = Invalid;

    fn try_from(me: &v1::Me) -> Result<Self, Invalid> {
        Ok(Self {
            id: NodeId(me.id),
            name: Name::parse(&me.name)?,
            key: node_public(&me.key)?,
            addresses: addresses(&me.v4, &me.v6)?,
            tags: tags(&me.tags)?,
            user: user(me.user.as_ref())?,
            expires: me.expires.map(UnixTime),
            expired: me.expired,
        })
    }
}

impl From<&Peer> for v1::Peer {
    fn from(peer: &Peer) -> Self {
        Self {
            id: peer.id.0,
            name: peer.name.to_string(),
            key: peer.key.0.to_vec(),
            v4: peer.addresses.v4.octets().to_vec(),
            v6: peer.addresses.v6.octets().to_vec(),
            endpoints: wire(peer.endpoints.iter().copied()),
            routes: wire(peer.routes.iter().copied()),
            tags: peer.tags.iter().map(Tag::to_string).collect(),
            user: peer.user.as_ref().map(UserName::to_string),
        }
    }
}

impl TryFrom<&v1::Peer> for Peer {
    type Error = Invalid;

    fn try_from(peer: &v1::Peer) -> Result<Self, Invalid> {
        Ok(Self {
            id: NodeId(peer.id),
            name: Name::parse(&peer.name)?,
            key: node_public(&peer.key)?,
            addresses: addresses(&peer.v4, &peer.v6)?,
            endpoints: set(&peer.endpoints, "endpoints")?,
            routes: set(&peer.routes, "routes")?,
            tags: tags(&peer.tags)?,
            user: user(peer.user.as_ref())?,
        })
    }
}
