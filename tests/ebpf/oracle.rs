//! What should happen to a packet, written for reading.
//!
//! It knows packets by what their sender meant, flows by who opened them, and policy by its entries.
//! It shares no code with the packet path: where both agree, they agree by the same words.

mod words;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_core::netmap::{Action, Entry, EntryKey, NodePolicy};
use mesh_core::{Direction, Identity};

use crate::packet::{Body, Packet};
use words::{
    ACK, FIN, FragmentName, Name, RST, SYN, can_open, fragment_key, is_multicast, opens_tcp,
    own_name, readable, service,
};

pub(crate) use words::Outcome;

#[derive(Clone, Debug)]
struct Flow {
    opened: Direction,
    established: bool,
    answered: bool,
    opener_is_done: bool,
    responder_is_done: bool,
    reset: bool,
    last: u64,
    /// The policy that judged it last, and what it said.
    judged: u32,
    denied: bool,
    peer: u32,
}

impl Flow {
    fn is_over(&self) -> bool {
        self.reset || (self.opener_is_done && self.responder_is_done)
    }

    /// Seconds of silence after which it is forgotten.
    fn patience(&self, proto: u8) -> u64 {
        match proto {
            6 if self.reset => 10,
            6 if self.is_over() => 30,
            6 if self.established => 8_000,
            6 => 20,
            1 | 58 => 10,
            _ if self.established => 120,
            _ => 30,
        }
    }
}

/// How far a peer has used what it may.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Strain {
    /// There are tokens for new flows, but fewer than half.
    Low,
    /// There is none.
    Empty,
    /// Its established flows are as many as they may be.
    Share,
    /// There is no token for an ICMP error.
    Errors,
}

#[derive(Debug, Default)]
pub(crate) struct Oracle {
    /// 0 until a policy was loaded.
    version: u32,
    policy: NodePolicy,
    own: Vec<IpAddr>,
    /// Which peer sends from which prefix.
    peers: HashMap<IpNet, u32>,
    flows: HashMap<Name, Flow>,
    fragments: HashMap<FragmentName, (Name, u64)>,
    pub(crate) seconds: u64,
    /// By peer, and by who opens: this node or the peer.
    pub(crate) strains: BTreeMap<(u32, Direction), Strain>,
    /// The programs have only just come to a host that had connections already.
    pub(crate) is_new_here: bool,
}

impl Oracle {
    pub(crate) fn load(
        &mut self,
        policy: NodePolicy,
        own: Vec<IpAddr>,
        peers: HashMap<IpNet, u32>,
    ) {
        self.version += 1;
        self.policy = policy;
        self.own = own;
        self.peers = peers;
    }

    /// Whether some flow would be so near the end of its patience that a real clock could disagree.
    pub(crate) fn is_on_edge(&self, later: u64) -> bool {
        let near = |age: u64, patience: u64| (patience.saturating_sub(9)..=patience).contains(&age);
        self.flows
            .iter()
            .any(|(name, flow)| near(self.seconds + later - flow.last, flow.patience(name.proto)))
            || self
                .fragments
                .values()
                .any(|(_, last)| near(self.seconds + later - last, 30))
    }

    pub(crate) fn judge(&mut self, packet: &Packet) -> Outcome {
        readable(packet)?;
        let name = self.name(packet)?;
        if self.version == 0 {
            return Err("no policy");
        }
        let outcome = match self.flows.get(&name) {
            Some(flow) if self.seconds - flow.last <= flow.patience(name.proto) => {
                self.of_flow(packet, &name)
            }
            _ => self.of_nothing(packet, &name),
        };
        if outcome.is_ok()
            && let Some(fragment) = packet.fragment
            && fragment.offset == 0
            && fragment.more
        {
            let key = fragment_key(packet, fragment.id);
            self.fragments.insert(key, (name, self.seconds));
        }
        outcome
    }

    /// The flow that a packet belongs to, or that an error speaks of.
    fn name(&self, packet: &Packet) -> Result<Name, &'static str> {
        if let Some(fragment) = packet.fragment
            && fragment.offset > 0
        {
            let first = self.fragments.get(&fragment_key(packet, fragment.id));
            return match first {
                Some((name, last)) if self.seconds - last <= 30 => Ok(name.clone()),
                _ => Err("fragment without first"),
            };
        }
        if let Body::IcmpError { quoted, .. } = &packet.body {
            // What is quoted went the other way.
            let mut quoted = quoted.as_ref().clone();
            quoted.direction = packet.direction.reverse();
            return Ok(own_name(&quoted));
        }
        Ok(own_name(packet))
    }

    fn of_flow(&mut self, packet: &Packet, name: &Name) -> Outcome {
        let mut flow = self.flows[name].clone();
        let is_opening = matches!(packet.body, Body::Tcp { flags, .. } if opens_tcp(flags))
            && !packet.is_later_fragment();
        if is_opening && flow.is_over() {
            return self.of_nothing(packet, name);
        }
        if flow.judged != self.version {
            flow.judged = self.version;
            let port = service(name, flow.opened);
            flow.denied = self.policy_says(name, flow.opened, port).is_err();
            flow.peer = self.peer(name.far);
        }
        let from_opener = packet.direction == flow.opened;
        let is_error = packet.is_error();
        if flow.denied {
            if !from_opener && can_open(packet) {
                return self.of_nothing(packet, name);
            }
            if !is_error {
                self.flows.insert(name.clone(), flow);
            }
            return Err("revoked");
        }
        if is_error {
            let foreign =
                self.identity(packet.source).is_none() || self.peer(packet.source) != flow.peer;
            return match (packet.is_too_big(), packet.direction) {
                (true, _) | (_, Direction::Egress) => Ok(()),
                _ if foreign => Err("icmp error from a third node"),
                _ if Direction::ALL
                    .iter()
                    .any(|way| self.is_strained(flow.peer, *way, &[Strain::Errors])) =>
                {
                    Err("icmp error rate")
                }
                _ => Ok(()),
            };
        }
        let was_reset = flow.reset;
        let mut resets = false;
        match packet.body {
            _ if packet.is_later_fragment() => {}
            Body::Tcp { flags, .. } if from_opener => {
                if flags & SYN != 0 && flags & ACK != 0 {
                    return Err("tcp out of state");
                }
                if flow.answered && flags & ACK != 0 && flags & RST == 0 {
                    flow.established = true;
                }
                flow.opener_is_done |= flags & FIN != 0;
                resets = flags & RST != 0;
            }
            Body::Tcp { flags, .. } => {
                if flags & (ACK | RST) == 0 {
                    return Err("tcp out of state");
                }
                flow.answered |= flags & SYN != 0;
                flow.responder_is_done |= flags & FIN != 0;
                resets = flags & RST != 0;
            }
            _ => flow.established |= !from_opener,
        }
        flow.reset |= resets;
        // Only the first one counts as a sign of life.
        if !(was_reset && resets) {
            flow.last = self.seconds;
        }
        self.flows.insert(name.clone(), flow);
        Ok(())
    }

    /// A packet of a flow that nobody remembers.
    fn of_nothing(&mut self, packet: &Packet, name: &Name) -> Outcome {
        let peer = self.peer(name.far);
        let tokens_are_low = |oracle: &Self, opened| {
            oracle.is_strained(peer, opened, &[Strain::Low, Strain::Empty, Strain::Share])
        };
        // Our answer to what a peer over its budget has asked.
        let is_answer = packet.direction == Direction::Egress
            && tokens_are_low(self, Direction::Ingress)
            && self
                .policy_says(name, Direction::Ingress, service(name, Direction::Ingress))
                .is_ok();
        if can_open(packet) {
            if is_multicast(name.far) || is_multicast(name.near) {
                return Err("multicast");
            }
            let port = match &packet.body {
                Body::Tcp { destination, .. }
                | Body::Udp { destination, .. }
                | Body::Sctp { destination, .. } => *destination,
                Body::Echo { request: true, .. } if packet.is_v4() => 8,
                Body::Echo { .. } => 128,
                Body::Icmp(kind) => u16::from(*kind),
                _ => 0,
            };
            let is_datagram = matches!(
                packet.body,
                Body::Udp { .. } | Body::Sctp { .. } | Body::Other(_)
            );
            match self.policy_says(name, packet.direction, port) {
                Err(_) if is_datagram && is_answer => {}
                Err(reason) => return Err(reason),
                Ok(()) if matches!(packet.body, Body::Icmp(_)) => {}
                Ok(()) => self.remember(name, packet.direction, false),
            }
            return Ok(());
        }
        if packet.is_error() {
            return Err("icmp error without flow");
        }
        let is_running = matches!(packet.body, Body::Tcp { flags, .. } if flags & (SYN | ACK | RST) == ACK)
            && !packet.is_later_fragment();
        let picks_up = is_running && self.is_new_here;
        let ways = [
            (
                packet.direction,
                picks_up || tokens_are_low(self, packet.direction),
            ),
            (packet.direction.reverse(), picks_up),
        ];
        for (opened, is_asked) in ways {
            if is_asked
                && self
                    .policy_says(name, opened, service(name, opened))
                    .is_ok()
            {
                if is_running {
                    self.remember(name, opened, true);
                }
                return Ok(());
            }
        }
        if is_answer && !picks_up {
            return Ok(());
        }
        Err("no flow")
    }

    /// If there is a token for it.
    fn remember(&mut self, name: &Name, opened: Direction, established: bool) {
        let peer = self.peer(name.far);
        if self.is_strained(peer, opened, &[Strain::Empty]) {
            return;
        }
        let flow = Flow {
            opened,
            established,
            answered: established,
            opener_is_done: false,
            responder_is_done: false,
            reset: false,
            last: self.seconds,
            judged: self.version,
            denied: false,
            peer,
        };
        self.flows.insert(name.clone(), flow);
    }

    fn is_strained(&self, peer: u32, opened: Direction, how: &[Strain]) -> bool {
        let strain = self.strains.get(&(peer, opened));
        strain.is_some_and(|strain| how.contains(strain))
    }

    /// May this flow be opened in this direction?
    fn policy_says(&self, name: &Name, opened: Direction, port: u16) -> Outcome {
        let far = self.identity(name.far).ok_or("unknown identity")?;
        if self.own.contains(&name.far) {
            return Err("own address");
        }
        let near = self.identity(name.near).ok_or("unknown local address")?;
        let matching: Vec<&Entry> = self
            .policy
            .entries
            .iter()
            .filter(|(key, _)| is_about(key, far, near, opened, name.proto, port))
            .map(|(_, entry)| entry)
            .collect();
        if matching.iter().any(|entry| entry.action == Action::Deny) {
            Err("denied by rule")
        } else if matching.is_empty() {
            Err("no rule")
        } else {
            Ok(())
        }
    }

    fn identity(&self, address: IpAddr) -> Option<Identity> {
        let around = self
            .policy
            .identities
            .iter()
            .filter(|(net, _)| net.contains(&address));
        around
            .max_by_key(|(net, _)| net.prefix_len())
            .map(|(_, identity)| *identity)
    }

    fn peer(&self, address: IpAddr) -> u32 {
        if self.own.contains(&address) {
            return 0;
        }
        let around = self.peers.iter().filter(|(net, _)| net.contains(&address));
        around
            .max_by_key(|(net, _)| net.prefix_len())
            .map_or(0, |(_, peer)| *peer)
    }
}

fn is_about(
    key: &EntryKey,
    far: Identity,
    near: Identity,
    opened: Direction,
    proto: u8,
    port: u16,
) -> bool {
    (key.remote == far || key.remote == Identity::ANY)
        && key.local == near
        && key.direction == opened
        && key.proto.is_none_or(|wanted| wanted == proto)
        && key.ports.contains(port)
}
