//! Which addresses a new node may have: `ipPool` of `nodeAttrs`.
//!
//! A pool is about nodes that come; who has an address keeps it. What lies in a pool is set aside
//! for those whom the pool means, so that an address says whose node it is outside the mesh too.

use ipnet::{IpNet, Ipv4Net};

use super::ipset::IpSet;
use super::resolve::{Extent, Resolver, Subjects};
use super::syntax::{Document, NodeAttributes};
use crate::node::Owner;

/// Where a new node's IPv4 address comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Allotment {
    /// The first that has a free address gives it.
    pub nets: Vec<Ipv4Net>,
    /// The line of the policy's `ipPool` that says so; `None`: it is what no pool sets aside.
    pub line: Option<u32>,
}

/// For a node of this owner: the first entry with pools that means it decides.
pub fn allotment(document: &Document, subjects: &Subjects<'_>, owner: &Owner) -> Allotment {
    let pooled = || {
        let entries = document.node_attributes.iter();
        entries.filter(|entry| !entry.ip_pool.is_empty())
    };
    let nets = |entry: &NodeAttributes| -> Vec<IpNet> {
        entry.ip_pool.iter().map(|pool| pool.value).collect()
    };
    if pooled().next().is_none() {
        return Allotment {
            nets: vec![subjects.pools.v4],
            line: None,
        };
    }
    let resolver = Resolver::new(document, subjects.pools);
    let user = owner.user().and_then(|user| subjects.users.get(&user));
    let user = user.map(AsRef::as_ref);
    // It has no address yet, so that no literal can mean it.
    let means = |extent: &Extent| *extent == Extent::Mesh || extent.owns(owner, user);
    let chosen = pooled().find(|entry| resolver.extents(entry.target.iter()).iter().any(means));
    let from = match chosen {
        Some(entry) => nets(entry),
        None => {
            let mut rest: IpSet = [IpNet::V4(subjects.pools.v4)].into_iter().collect();
            rest.alter(pooled().flat_map(nets).collect(), false);
            rest.prefixes()
        }
    };
    let v4 = |net| match net {
        IpNet::V4(net) => Some(net),
        IpNet::V6(_) => None,
    };
    Allotment {
        nets: from.into_iter().filter_map(v4).collect(),
        line: chosen.map(|entry| document.lines.line(entry.span)),
    }
}
