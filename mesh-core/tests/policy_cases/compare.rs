//! What our policy makes of a case, beside what was recorded.
//!
//! Reach is read off the entries that a node would load, by the naive look-up that the packet path
//! promises to equal, at the receiver and, where the sender is a node, at the sender too.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use mesh_core::netmap::{Action, NodePolicy, PortRange};
use mesh_core::node::NodeId;
use mesh_core::policy::CompiledPolicy;
use mesh_core::{Direction, Identity};

use crate::case::{Approval, Case, Reach, Scene, SeenPeer, owner, shown};
use crate::services;

/// Every difference, one line each; empty is exact.
pub(crate) fn differences(case: &Case) -> Vec<String> {
    let scene = case.scene(Approval::AsRecorded);
    let policy = match (scene.mesh.try_policy(&case.policy_text), case.accepted) {
        (Ok(policy), true) => policy,
        (Err(_), false) => return Vec::new(),
        (Ok(_), false) => {
            let error = case.error.as_deref().unwrap_or_default();
            return vec![format!("was refused, we accept: {error}")];
        }
        (Err(problems), true) => return vec![format!("was accepted, we refuse: {problems}")],
    };
    let mut differences = Vec::new();
    if let Some(reach) = &case.reach {
        reachability(reach, &scene, &policy, &mut differences);
    }
    peers(case, &scene, &policy, &mut differences);
    services::compare(case, &scene, &policy, &mut differences);
    differences
}

fn reachability(
    reach: &Reach,
    scene: &Scene,
    policy: &CompiledPolicy,
    differences: &mut Vec<String>,
) {
    let loaded: BTreeMap<NodeId, Loaded> = scene
        .ids
        .values()
        .map(|&id| (id, Loaded::new(&policy.node(id), reach.addrs.values())))
        .collect();
    for (receiver, id) in &scene.ids {
        // A node that was not there to be asked.
        let Some(recorded) = reach.allow.get(receiver) else {
            continue;
        };
        let exit = scene.mesh.nodes[id].is_exit_node();
        for (dst, &to) in &reach.addrs {
            let own = dst.split('/').next() == Some(receiver);
            let routed = dst.starts_with("ROUTE:") && dst.ends_with(&format!(":{receiver}"));
            if !(own || routed || (exit && dst.starts_with("EXT/"))) {
                continue;
            }
            for (src, &from) in &reach.addrs {
                let sender = owner(src);
                if sender == Some(receiver) || from.is_ipv4() != to.is_ipv4() {
                    continue;
                }
                let recorded = recorded.get(dst).and_then(|allow| allow.get(src));
                let recorded = recorded.map_or("", String::as_str);
                let ours = spec(&loaded[id], from, to, Direction::Ingress);
                if ours != recorded {
                    differences.push(format!(
                        "{src} -> {dst} at {receiver}: recorded {recorded:?}, ours {ours:?}"
                    ));
                }
                if own && let Some(sender) = sender.filter(|_| !src.starts_with("ROUTE:")) {
                    let sent = spec(
                        &loaded[scene
                            .ids
                            .get(sender)
                            .unwrap_or_else(|| panic!("{sender} of {src}"))],
                        to,
                        from,
                        Direction::Egress,
                    );
                    if sent != ours {
                        differences.push(format!(
                            "{src} -> {dst}: the sender says {sent:?}, the receiver {ours:?}"
                        ));
                    }
                }
            }
        }
    }
}

/// What a node loads, arranged for many questions.
struct Loaded {
    identities: BTreeMap<IpAddr, Identity>,
    accepts: BTreeMap<(Identity, Identity, Direction), Vec<(u8, PortRange)>>,
}

impl Loaded {
    fn new<'a>(policy: &NodePolicy, addresses: impl Iterator<Item = &'a IpAddr>) -> Self {
        let identity = |address: &IpAddr| {
            let holders = policy.identities.iter();
            let holders = holders.filter(|(net, _)| net.contains(address));
            let longest = holders.max_by_key(|(net, _)| net.prefix_len());
            Some((*address, *longest?.1))
        };
        let mut accepts: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for (key, entry) in &policy.entries {
            let protocol = key.proto.expect("compiled entries name their protocol");
            if entry.action == Action::Accept {
                let pair = (key.remote, key.local, key.direction);
                accepts.entry(pair).or_default().push((protocol, key.ports));
            }
        }
        Self {
            identities: addresses.filter_map(identity).collect(),
            accepts,
        }
    }
}

/// What a node's entries let through, as the cases write it. ICMP shows as an echo of the family.
fn spec(loaded: &Loaded, remote: IpAddr, local: IpAddr, direction: Direction) -> String {
    let identity = |address| loaded.identities.get(&address).copied();
    let (Some(remote_id), Some(local_id)) = (identity(remote), identity(local)) else {
        return String::new();
    };
    let accepts = loaded.accepts.get(&(remote_id, local_id, direction));
    let mut by_protocol: BTreeMap<u8, BTreeSet<(u16, u16)>> = BTreeMap::new();
    let mut echo = false;
    let (icmp, request) = if remote.is_ipv4() { (1, 8) } else { (58, 128) };
    for (protocol, ports) in accepts.into_iter().flatten() {
        match protocol {
            1 | 58 => echo |= *protocol == icmp && ports.contains(request),
            _ => {
                let ranges = by_protocol.entry(*protocol).or_default();
                ranges.insert((ports.first, ports.last));
            }
        }
    }
    let mut parts: Vec<String> = by_protocol
        .iter()
        .map(|(protocol, ranges)| format!("{protocol}:{}", ports(ranges)))
        .collect();
    if echo {
        parts.push("icmp".to_owned());
    }
    parts.join(";")
}

/// Neighbouring ranges joined: entries are cut where another rule takes over.
fn ports(ranges: &BTreeSet<(u16, u16)>) -> String {
    let mut joined: Vec<(u16, u16)> = Vec::new();
    for &(first, last) in ranges {
        match joined.last_mut() {
            Some(previous) if previous.1.checked_add(1) == Some(first) => previous.1 = last,
            _ => joined.push((first, last)),
        }
    }
    if joined == [(0, u16::MAX)] {
        return "*".to_owned();
    }
    let one = |&(first, last): &(u16, u16)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    joined.iter().map(one).collect::<Vec<_>>().join(",")
}

/// What each viewer was shown of each peer: `None` where nothing.
type Views = BTreeMap<(String, String), Option<SeenPeer>>;

fn peers(case: &Case, scene: &Scene, policy: &CompiledPolicy, differences: &mut Vec<String>) {
    let ours = views(scene, policy);
    let approved = case.scene(Approval::Automatic);
    let policy = approved.mesh.policy(&case.policy_text);
    let after = views(&approved, &policy);
    for (viewer, seen) in case.netmap.iter().flatten() {
        for peer in scene.ids.keys().filter(|peer| *peer != viewer) {
            let recorded = seen.peers.get(peer).map(SeenPeer::sorted);
            let pair = (viewer.clone(), peer.clone());
            if recorded != ours[&pair] && recorded != after[&pair] {
                differences.push(format!(
                    "{viewer} sees {peer}: recorded {}, ours {}",
                    told(recorded.as_ref()),
                    told(ours[&pair].as_ref()),
                ));
            }
        }
    }
}

fn told(seen: Option<&SeenPeer>) -> String {
    seen.map_or_else(
        || "not at all".to_owned(),
        |seen| {
            let SeenPeer {
                allowed_ips,
                primary_routes,
            } = seen;
            format!("with {allowed_ips:?}, primary for {primary_routes:?}")
        },
    )
}

fn views(scene: &Scene, policy: &CompiledPolicy) -> Views {
    let mut views = Views::new();
    for (viewer, me) in &scene.ids {
        let visible = policy.peers(*me);
        for (peer, them) in &scene.ids {
            let seen = visible.contains(them).then(|| SeenPeer {
                allowed_ips: shown(policy.allowed_ips(*me, *them)),
                primary_routes: shown(
                    policy
                        .routes(*me, *them)
                        .into_iter()
                        .filter(|net| net.prefix_len() > 0),
                ),
            });
            views.insert((viewer.clone(), peer.clone()), seen);
        }
    }
    views
}

impl SeenPeer {
    fn sorted(&self) -> Self {
        let sorted = |nets: &[String]| shown(nets.iter().map(|net| net.parse().unwrap()));
        Self {
            allowed_ips: sorted(&self.allowed_ips),
            primary_routes: sorted(&self.primary_routes),
        }
    }
}
