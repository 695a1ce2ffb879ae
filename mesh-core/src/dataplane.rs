//! What the packet filter's tables must hold, and the steps from one content to the next.
//!
//! The kernel has no transaction over several maps. A policy is one of them, but who stands behind an
//! address lies in others, and an identity's number means something only beside the policy that it was
//! compiled with. So every map has two sides, of which one is in use: a change is written
//! into the other, and one word, the generation, puts that in use everywhere. No packet meets half of each,
//! and whom both contents let pass passes in between.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_common::addr::Prefix;
use mesh_common::maps::Config;
use mesh_common::policy::PolicyPrefix;
use mesh_common::{Address, Direction, IdentityEntry, PolicyEntry, PolicyKey, tcp};

use crate::changes::changes;
use crate::netmap::Netmap;
use crate::node::Addresses;
use crate::world::Pools;
use crate::{Identity, RuleId};

mod review;
mod rows;
pub mod vigil;
pub mod why;

pub use review::Review;
pub use rows::{RowWrite, layout, longest};

/// The tables of one node, as plain values.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tables {
    /// Who stands behind a prefix; the longest wins. Host prefixes are the kernel's `id_exact`.
    pub identities: BTreeMap<Prefix, IdentityEntry>,
    pub rows: BTreeMap<PolicyPrefix, PolicyEntry>,
    /// Every rule that a row names: those are counted.
    pub rules: BTreeSet<RuleId>,
    pub settings: Settings,
}

/// What else the packet path must know.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Settings {
    /// Greatest MSS of a SYN, by family; 0 leaves it alone.
    pub mss_v4: u16,
    pub mss_v6: u16,
    /// The node's own addresses, which no other interface may receive packets for.
    pub own_v4: Address,
    pub own_v6: Address,
    /// The masks of the mesh's pools, of IPv6 the first half.
    pub pool_v4: u32,
    pub pool_v6: [u32; 2],
}

impl Settings {
    /// `own` are the node's addresses, and `mtu` is the mesh device's.
    pub fn new(own: Addresses, pools: &Pools, mtu: u16) -> Self {
        let [_, _, _, pool_v4] = Address::from(IpAddr::from(pools.v4.netmask())).words();
        let [high, low, ..] = Address::from(IpAddr::from(pools.v6.netmask())).words();
        Self {
            mss_v4: tcp::max_mss(mtu, false),
            mss_v6: tcp::max_mss(mtu, true),
            own_v4: IpAddr::from(own.v4).into(),
            own_v6: IpAddr::from(own.v6).into(),
            pool_v4,
            pool_v6: [high, low],
        }
    }

    /// Those that the kernel has.
    pub fn of(config: &Config) -> Self {
        Self {
            mss_v4: config.mss_v4,
            mss_v6: config.mss_v6,
            own_v4: config.own_v4,
            own_v6: config.own_v6,
            pool_v4: config.pool_v4,
            pool_v6: config.pool_v6,
        }
    }

    pub fn set_in(self, config: Config) -> Config {
        Config {
            mss_v4: self.mss_v4,
            mss_v6: self.mss_v6,
            own_v4: self.own_v4,
            own_v6: self.own_v6,
            pool_v4: self.pool_v4,
            pool_v6: self.pool_v6,
            ..config
        }
    }
}

impl Tables {
    /// The tables of the netmap's own node. `mtu` is the mesh device's.
    pub fn of(netmap: &Netmap, mtu: u16) -> Self {
        let local = netmap.me.addresses;
        let senders: BTreeMap<IpNet, u32> = netmap
            .peers
            .values()
            .flat_map(|peer| {
                // The kernel tells peers apart by 32 bits; that many nodes were never enrolled.
                peer.allowed_ips().map(|net| (net, peer.id.0 as u32))
            })
            .collect();
        let identities = netmap
            .policy
            .identities
            .iter()
            .map(|(net, identity)| {
                let is_local =
                    net.prefix_len() == net.max_prefix_len() && local.contains(net.addr());
                let entry = IdentityEntry {
                    identity: *identity,
                    flags: if is_local { IdentityEntry::LOCAL } else { 0 },
                    peer: if is_local { 0 } else { sender(&senders, *net) },
                };
                (prefix(*net), entry)
            })
            .collect();
        let rows = rows::compile(&netmap.policy);
        Self {
            identities,
            rules: rows.values().map(|entry| entry.rule).collect(),
            rows,
            settings: Settings::new(local, &netmap.mesh.pools, mtu),
        }
    }

    /// The tables of a kernel whose policy cannot be read back: whatever is desired differs from it.
    pub fn unreadable(
        identities: BTreeMap<Prefix, IdentityEntry>,
        rules: BTreeSet<RuleId>,
        settings: Settings,
    ) -> Self {
        // No policy is compiled to a row that every flow matches.
        let row = PolicyPrefix {
            len: 0,
            key: PolicyKey::new(Identity(0), Identity(0), Direction::Ingress, 0, 0),
        };
        Self {
            identities,
            rows: BTreeMap::from([(row, PolicyEntry::deny(RuleId::NONE))]),
            rules,
            settings,
        }
    }

    /// Who stands behind `address`.
    pub fn identity(&self, address: IpAddr) -> IdentityEntry {
        let address = Address::from(address);
        self.behind(&Prefix { len: 128, address })
    }

    /// The entry of the longest prefix that contains `prefix`.
    fn behind(&self, prefix: &Prefix) -> IdentityEntry {
        let entry = (0..=prefix.len).rev().find_map(|len| {
            let address = prefix.address.masked(len as u8);
            self.identities.get(&Prefix { len, address })
        });
        entry.copied().unwrap_or(IdentityEntry::UNKNOWN)
    }

    /// The longest row that matches a new flow.
    pub fn row(&self, key: &PolicyKey) -> PolicyEntry {
        longest(key, |prefix| self.rows.get(prefix).copied())
    }
}

/// The peer that sends from `net`: the one with the longest prefix around it, 0 for none.
fn sender(senders: &BTreeMap<IpNet, u32>, net: IpNet) -> u32 {
    std::iter::successors(Some(net.trunc()), IpNet::supernet)
        .find_map(|around| senders.get(&around).copied())
        .unwrap_or(0)
}

/// As the kernel's tries write it: IPv4 behind the 96 bits of the mapped prefix.
pub fn prefix(net: IpNet) -> Prefix {
    let before = if net.network().is_ipv4() { 96 } else { 0 };
    Prefix {
        len: before + u32::from(net.prefix_len()),
        address: net.network().into(),
    }
}

/// One step from one content to the next. Rows and identities are written where no packet looks yet; raising the
/// generation then puts them in use, as a whole ([`mesh_common::Sides`]), and the settings with them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TableOp {
    SetRow(PolicyPrefix, PolicyEntry),
    RemoveRow(PolicyPrefix),
    /// What stands behind a prefix, also of one that only one of the contents has.
    Identify(Prefix, Turn),
    CountRule(RuleId),
    /// Only once no packet is under way that was begun before.
    ForgetRule(RuleId),
    Set(Settings),
}

/// Who stands behind a prefix as long as the generation stands, and from the next on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Turn {
    pub before: IdentityEntry,
    pub after: IdentityEntry,
}

/// The steps from what is to what should be. None if they are equal.
pub fn reconcile(observed: &Tables, desired: &Tables) -> Vec<TableOp> {
    let mut ops = Vec::new();
    // A rule is counted before it can decide.
    ops.extend(
        desired
            .rules
            .difference(&observed.rules)
            .map(|rule| TableOp::CountRule(*rule)),
    );
    ops.extend(rows(observed, desired));
    ops.extend(turns(observed, desired));
    if observed.settings != desired.settings {
        ops.push(TableOp::Set(desired.settings));
    }
    ops.extend(
        observed
            .rules
            .difference(&desired.rules)
            .map(|rule| TableOp::ForgetRule(*rule)),
    );
    ops
}

/// The prefixes that come, go, or change. One that only one content has is, in the other, what the wider one
/// around it is: the kernel's search ends at the longest prefix, whichever content it is of.
fn turns<'a>(observed: &'a Tables, desired: &'a Tables) -> impl Iterator<Item = TableOp> + 'a {
    changes(&observed.identities, &desired.identities).map(|(prefix, _)| {
        let turn = Turn {
            before: observed.behind(prefix),
            after: desired.behind(prefix),
        };
        TableOp::Identify(*prefix, turn)
    })
}

fn rows<'a>(observed: &'a Tables, desired: &'a Tables) -> impl Iterator<Item = TableOp> + 'a {
    changes(&observed.rows, &desired.rows).map(|(prefix, entry)| match entry {
        Some(entry) => TableOp::SetRow(*prefix, *entry),
        None => TableOp::RemoveRow(*prefix),
    })
}

#[cfg(test)]
mod tests;
