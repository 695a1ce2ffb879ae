//! The mesh's interface in the host's routing: addresses, routes, and the rules that rank them.
//!
//! Hard about it is to be a guest in somebody's routing. Four things must hold:
//!
//! - *Encrypted packets never enter the mesh.* A subnet route may cover the very endpoint that it
//!   is reached through. They carry [`FWMARK`], and every rule of ours skips marked packets, so
//!   they are routed as if we were not there (wg-quick does the same for its default route).
//! - *The host's own networks win where they are more specific, and on a tie.* Its LAN stays
//!   reachable when a peer advertises the same prefix, and an underlay that itself uses
//!   100.64.0.0/10 keeps its gateway and its resolver. Tailscale puts its table 52 in front of the
//!   main one and loses them; wg-quick looks the main table up first without its default route
//!   (`suppress_prefixlength 0`), and loses a mesh route to any wider static one.
//! - *Ours win where they are more specific.* The main table would rank by itself, but marked
//!   packets could not skip our routes there. So they stand in a table of their own, and the rules
//!   ask both tables in turn, once for each prefix length that we route, the longest first:
//!   together they are one longest-prefix match. A mesh has one to three lengths a family.
//! - *What is for the mesh goes nowhere else.* A userspace device dies with its agent, its routes
//!   with it, and the host's default route would carry in clear what was meant to be encrypted. So
//!   a second table holds the same prefixes as unreachable, and a rule behind all others of ours
//!   asks it. In the first table they would not do: rules let an unreachable route of IPv4 through
//!   whatever its length (`fib_rules_lookup` suppresses results, not errors), and the host's more
//!   specific networks would lose.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::health::{Condition, Severity};

/// The mark of encrypted packets, a byte of the mark that Tailscale (0x80000/0xff0000) compares as
/// well and Kubernetes (0x4000, 0x8000) and Cilium (0x0f00) leave alone.
pub const FWMARK: u32 = 0x004d_0000;
/// The part of a packet's mark that is compared with [`FWMARK`].
pub const FWMARK_MASK: u32 = 0x00ff_0000;
/// The table of our routes, and before the one of what is unreachable without them. Below 256 lie
/// the numbers that people give by hand.
pub const TABLE: u32 = 7700;
/// `RT_TABLE_MAIN`.
pub const TABLE_MAIN: u32 = 254;
/// Our first rule, in front of the main table's (32766) and of Tailscale's (5210).
pub const FIRST_PRIORITY: u32 = 4900;
/// The longest prefix, of IPv6.
const LONGEST: u32 = 128;
/// The last of the room for our rules: two for each prefix length, of which IPv6 has 129, and this
/// one for what is unreachable.
pub const LAST_PRIORITY: u32 = FIRST_PRIORITY + 2 * (LONGEST + 1);
/// Marks routes and rules as ours (`rtm_protocol`): a number that /etc/iproute2/rt_protos leaves free.
pub const PROTOCOL: u8 = 77;

/// What should stand.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Config {
    /// Addresses of the interface, as host prefixes.
    pub addresses: BTreeSet<IpNet>,
    pub mtu: u32,
    pub up: bool,
    /// Prefixes that go into the mesh: its pools and the peers' subnet routes.
    pub routes: BTreeSet<IpNet>,
    /// Prefixes that go into the mesh or nowhere, whether the interface stands or not.
    pub only_mesh: BTreeSet<IpNet>,
    /// The table that holds the routes; [`TABLE`] unless two meshes share a host.
    pub table: u32,
}

/// What stands.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Status {
    /// Link-local addresses left out.
    pub addresses: BTreeSet<IpNet>,
    pub mtu: u32,
    pub up: bool,
    /// Routes of our table, through our interface.
    pub routes: BTreeSet<IpNet>,
    /// Unreachable prefixes of the table behind it.
    pub unreachable: BTreeSet<IpNet>,
    /// Rules of ours, whatever they say.
    pub rules: BTreeSet<Rule>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Family {
    V4,
    V6,
}

/// "Packets without our mark: look `table` up, but take nothing as wide as `suppress`."
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Rule {
    pub family: Family,
    pub priority: u32,
    pub table: u32,
    /// Results with this prefix length or a shorter one do not count; `None` takes all.
    pub suppress: Option<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    SetMtu(u32),
    SetUp(bool),
    AddAddress(IpNet),
    RemoveAddress(IpNet),
    AddRoute(IpNet),
    RemoveRoute(IpNet),
    AddUnreachable(IpNet),
    RemoveUnreachable(IpNet),
    AddRule(Rule),
    RemoveRule(Rule),
}

/// The steps from `status` to `config`, none if it is there.
///
/// What both send the same way goes it at every step: what comes is there before what goes is taken away, and the
/// rules by which the host's own networks win come first and go last. Those into the mesh come after the routes
/// that they point at, and routes need an interface that is up; taking it down makes the kernel drop its routes,
/// which is not left to chance. What is unreachable without the mesh is so before and after.
pub fn reconcile(config: &Config, status: &Status) -> Vec<Op> {
    let routes: BTreeSet<IpNet> = match config.up {
        true => config.routes.iter().map(IpNet::trunc).collect(),
        false => BTreeSet::new(),
    };
    let unreachable: BTreeSet<IpNet> = config.only_mesh.iter().map(IpNet::trunc).collect();
    let mut rules = rules(&routes, config.table);
    rules.extend(last_rules(&unreachable, config.table));
    // A link that is down holds no routes, whatever was observed a moment ago.
    let no_routes = BTreeSet::new();
    let held = if status.up {
        &status.routes
    } else {
        &no_routes
    };
    // Somebody has changed it, and the kernel takes one away by its priority.
    let is_in_the_way = |old: &Rule| {
        let is_there = |new: &Rule| (new.family, new.priority) == (old.family, old.priority);
        rules.iter().any(is_there)
    };
    let old = status.rules.difference(&rules);
    let (in_the_way, old): (Vec<&Rule>, Vec<_>) = old.partition(|rule| is_in_the_way(rule));
    let (old_main, old): (Vec<&Rule>, Vec<_>) =
        old.into_iter().partition(|rule| rule.table == TABLE_MAIN);
    let new = rules.difference(&status.rules);
    let (new_main, new): (Vec<&Rule>, Vec<_>) = new.partition(|rule| rule.table == TABLE_MAIN);
    let add_rule = |rule: &Rule| Op::AddRule(*rule);
    let remove_rule = |rule: &Rule| Op::RemoveRule(*rule);
    let remove_routes = held.difference(&routes).map(|net| Op::RemoveRoute(*net));

    let mut ops = Vec::new();
    ops.extend(in_the_way.into_iter().map(remove_rule));
    ops.extend(new_main.into_iter().map(add_rule));
    ops.extend(
        unreachable
            .difference(&status.unreachable)
            .map(|net| Op::AddUnreachable(*net)),
    );
    if status.up && !config.up {
        ops.extend(remove_routes.clone());
        ops.push(Op::SetUp(false));
    }
    ops.extend(
        status
            .addresses
            .difference(&config.addresses)
            .map(|net| Op::RemoveAddress(*net)),
    );
    if config.mtu != status.mtu {
        ops.push(Op::SetMtu(config.mtu));
    }
    ops.extend(
        config
            .addresses
            .difference(&status.addresses)
            .map(|net| Op::AddAddress(*net)),
    );
    if config.up && !status.up {
        ops.push(Op::SetUp(true));
    }
    ops.extend(routes.difference(held).map(|net| Op::AddRoute(*net)));
    ops.extend(new.into_iter().map(add_rule));
    ops.extend(old.into_iter().map(remove_rule));
    if config.up {
        ops.extend(remove_routes);
    }
    ops.extend(
        status
            .unreachable
            .difference(&unreachable)
            .map(|net| Op::RemoveUnreachable(*net)),
    );
    ops.extend(old_main.into_iter().map(remove_rule));
    ops
}

/// The rules that make one longest-prefix match of the main table and ours. Those of one length have a place of
/// their own, so that another length changes nothing about them.
fn rules(routes: &BTreeSet<IpNet>, table: u32) -> BTreeSet<Rule> {
    let mut rules = BTreeSet::new();
    for net in routes {
        let length = u32::from(net.prefix_len());
        let priority = first_of(net.prefix_len());
        // Everything at least as long as `length` counts. A default route is the exception:
        // the host's own would win the tie and nothing would ever take ours.
        let wider = length.checked_sub(1);
        let main = wider.or(Some(0));
        for (priority, table, suppress) in
            [(priority, TABLE_MAIN, main), (priority + 1, table, wider)]
        {
            rules.insert(Rule {
                family: family_of(net),
                priority,
                table,
                suppress,
            });
        }
    }
    rules
}

/// The priority of the first of the two rules for prefixes of this length: the longer, the smaller.
pub fn first_of(length: u8) -> u32 {
    FIRST_PRIORITY + 2 * (LONGEST - u32::from(length))
}

/// The rules behind those, for what is left.
fn last_rules(unreachable: &BTreeSet<IpNet>, table: u32) -> BTreeSet<Rule> {
    unreachable
        .iter()
        .map(|net| Rule {
            family: family_of(net),
            priority: LAST_PRIORITY,
            table: unreachable_table(table),
            suppress: None,
        })
        .collect()
}

/// The table of unreachable prefixes beside a table of routes.
pub fn unreachable_table(table: u32) -> u32 {
    table + 1
}

fn family_of(net: &IpNet) -> Family {
    match net {
        IpNet::V4(_) => Family::V4,
        IpNet::V6(_) => Family::V6,
    }
}

/// A prefix that some interface of the host other than ours is connected to.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct LocalPrefix {
    pub interface: String,
    /// The interface's address with its prefix length.
    pub net: IpNet,
}

/// The name under which [`overlap`] stands among the health conditions.
pub const POOL_OVERLAP: &str = "PoolOverlap";

/// Where the host's own networks and the mesh's prefixes claim the same addresses.
///
/// The host's more specific network wins, so every node whose address lies in it is out of reach;
/// that is bearable for a /24 of the pool, and an error for all of it.
pub fn overlap(local: &BTreeSet<LocalPrefix>, pools: &BTreeSet<IpNet>) -> Option<Condition> {
    let (local, pool) = local
        .iter()
        .flat_map(|local| pools.iter().map(move |pool| (local, pool)))
        .filter(|(local, pool)| pool.contains(&local.net.trunc()) || local.net.contains(*pool))
        .min_by_key(|(local, _)| local.net.prefix_len())?;
    let severity = if local.net.prefix_len() == pool.prefix_len() {
        Severity::Error
    } else {
        Severity::Warning
    };
    Some(Condition {
        severity,
        text: Overlap { local, pool }.to_string(),
        next_step: "give the mesh another pool, or renumber the local network",
    })
}

struct Overlap<'a> {
    local: &'a LocalPrefix,
    pool: &'a IpNet,
}

impl fmt::Display for Overlap<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (interface, net) = (&self.local.interface, self.local.net.trunc());
        let (theirs, ours) = (self.local.net.prefix_len(), self.pool.prefix_len());
        write!(
            f,
            "{net} on {interface} overlaps the mesh's {}: ",
            self.pool
        )?;
        if theirs >= ours {
            write!(f, "nodes with an address in {net} are out of reach")
        } else {
            let pool = self.pool;
            write!(f, "local hosts with an address in {pool} are out of reach")
        }
    }
}

/// Whether an address can be an endpoint that peers reach us at.
///
/// Loopback, link-local, multicast and unspecified addresses mean something else on every host.
pub fn is_reportable(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            !(v4.is_loopback()
                || v4.is_link_local()
                || v4.is_unspecified()
                || v4.is_multicast()
                || v4.is_broadcast())
        }
        IpAddr::V6(v6) => {
            !(v6.is_loopback()
                || v6.is_unicast_link_local()
                || v6.is_unspecified()
                || v6.is_multicast())
        }
    }
}

#[cfg(test)]
mod tests;
