//! The flow log: what the packet path told of flows and denials, as records for people.
//!
//! The packet path tells each thing once and may be too busy even for that, so what is in its tables
//! is read besides, every few seconds: a flow that moved bytes, one that is gone without a word, and
//! denials that were counted but not told of. Whatever was lost on the way is a number in the log, and
//! never a record that is missing in silence.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};

use mesh_common::event::{DenyEntry, DenyKey, EventKind, FlowEvent};
use mesh_common::flow::{FlowEntry, FlowKey, flags};
use mesh_common::{Be16, Direction, DropReason};

use crate::{Identity, RuleId};

mod describe;
mod query;
#[cfg(test)]
mod tests;

pub use describe::{Described, End};
pub use query::Query;

/// Kinds of denials that one walk tells of for each peer, beside one for all the others.
const DENIALS_OF_ONE_PEER: usize = 64;

/// What a record says.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// A packet opened a flow.
    Opened,
    /// The other end answered.
    Confirmed,
    /// The flow has carried something since it was last told of.
    Active,
    /// Its ends closed it.
    Closed,
    /// It ended in silence.
    Idle,
    /// The policy that stands now denies it.
    Revoked,
    /// Packets that were dropped, so many so far.
    Denied,
}

impl Kind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Opened => "opened",
            Self::Confirmed => "confirmed",
            Self::Active => "active",
            Self::Closed => "closed",
            Self::Idle => "idle",
            Self::Revoked => "revoked",
            Self::Denied => "denied",
        }
    }

    /// Whether the policy lets such packets pass.
    pub const fn is_allowed(self) -> bool {
        !matches!(self, Self::Revoked | Self::Denied)
    }
}

/// One line of the flow log, in the kernel's numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    pub kind: Kind,
    /// Nanoseconds of the packet path's clock, as the next.
    pub time: u64,
    /// When the flow was opened, or the first of the denied packets came.
    pub first: u64,
    /// Of a denial that was only counted, the ports and addresses are zero but for the service's port;
    /// of many that are told as one, that and the protocol are zero too.
    pub key: FlowKey,
    /// Which way the flow was opened, or the denied packets went.
    pub direction: Direction,
    pub remote: Identity,
    pub local: Identity,
    pub rule: RuleId,
    /// The node at the far end; 0 for nobody known.
    pub peer: u32,
    /// Why packets are dropped; `None` for what is allowed, and for a reason that this build does not
    /// know.
    pub reason: Option<DropReason>,
    /// By [`Direction`], since `first`.
    pub packets: [u64; 2],
    pub bytes: [u64; 2],
}

/// Turns events and tables into records.
#[derive(Debug, Default)]
pub struct FlowLog {
    flows: BTreeMap<FlowKey, Known>,
    /// How many packets of each kind of denial were told of.
    denials: BTreeMap<DenyKey, u64>,
    /// How many events of each kind the packet path could not tell, when last asked.
    lost: BTreeMap<EventKind, u64>,
    /// What is still to be told, oldest first.
    records: VecDeque<Record>,
    losses: VecDeque<Loss>,
}

/// Events that nobody was told of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Loss {
    pub kind: EventKind,
    pub count: u64,
}

/// What was last told of a flow.
#[derive(Clone, Copy, Debug)]
struct Known {
    record: Record,
    /// The walk that saw it last.
    walk: Walk,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Walk {
    Seen,
    Unseen,
}

impl FlowLog {
    /// The packet path told of something. What is no event of this build is left out.
    pub fn handle_event(&mut self, event: &FlowEvent) {
        let Some(kind) = event.kind() else { return };
        let mut record = Record {
            kind: match kind {
                EventKind::Opened => Kind::Opened,
                EventKind::Confirmed => Kind::Confirmed,
                EventKind::Closed => Kind::Closed,
                EventKind::Revoked => Kind::Revoked,
                EventKind::Denied => Kind::Denied,
            },
            time: event.time,
            first: event.first,
            key: event.key,
            direction: event.direction(),
            remote: event.remote,
            local: event.local,
            rule: event.rule,
            peer: event.peer,
            reason: event.reason(),
            packets: event.packets,
            bytes: event.bytes,
        };
        if record.kind != Kind::Denied {
            record.packets = self.unwrapped(&event.key, event.first, event.packets);
        }
        match record.kind {
            Kind::Opened | Kind::Confirmed | Kind::Active => self.know(record),
            Kind::Closed | Kind::Idle => drop(self.flows.remove(&record.key)),
            Kind::Revoked => {
                record.reason = Some(DropReason::Revoked);
                // The table holds the tombstone, of which the next walk has nothing new to say.
                if self.is_known_revoked(&record.key) {
                    return;
                }
                self.know(record);
            }
            Kind::Denied => {
                let packets = record.packets[record.direction as usize];
                self.denials.insert(deny_key(&record), packets);
            }
        }
        self.records.push_back(record);
    }

    /// One established flow, in a walk over all of them.
    pub fn handle_flow(&mut self, key: FlowKey, entry: &FlowEntry) {
        let denied = entry.state.flags & flags::DENIED != 0;
        let record = Record {
            kind: if denied { Kind::Revoked } else { Kind::Active },
            time: entry.state.last_seen,
            first: entry.opened,
            key,
            direction: entry.state.opened(),
            remote: entry.state.remote,
            local: entry.state.local,
            rule: entry.state.rule,
            peer: entry.state.peer,
            reason: denied.then_some(DropReason::Revoked),
            packets: self.unwrapped(&key, entry.opened, entry.packets.map(u64::from)),
            bytes: entry.bytes,
        };
        let news = match self.flows.get(&key) {
            Some(known) if known.record.kind == Kind::Revoked => !denied,
            Some(known) => denied || known.record.bytes != record.bytes,
            None => true,
        };
        if news {
            self.know(record);
            self.records.push_back(record);
        } else if let Some(known) = self.flows.get_mut(&key) {
            known.walk = Walk::Seen;
        }
    }

    /// One flow that nobody has answered: of interest only if its opening was told, because a flood
    /// leaves many.
    pub fn handle_half_open(&mut self, key: FlowKey, entry: &FlowEntry) {
        if self.flows.contains_key(&key) {
            self.handle_flow(key, entry);
        }
    }

    /// A change of the policy has ended a flow, just now. `now` is of the packet path's clock.
    pub fn handle_ended(&mut self, key: FlowKey, entry: &FlowEntry, now: u64) {
        let mut entry = *entry;
        entry.state.last_seen = now;
        self.handle_flow(key, &entry);
    }

    /// The walk is over: what it did not meet has ended in silence. `now` is of the packet path's
    /// clock.
    pub fn handle_walked(&mut self, now: u64) {
        let gone = self
            .flows
            .extract_if(.., |_, known| known.walk == Walk::Unseen);
        for (_, known) in gone {
            // A revoked flow was told of as such; its tombstone's end is no news.
            if known.record.kind != Kind::Revoked {
                self.records.push_back(Record {
                    kind: Kind::Idle,
                    time: now,
                    ..known.record
                });
            }
        }
        for known in self.flows.values_mut() {
            known.walk = Walk::Unseen;
        }
    }

    /// What the packet path counted of denials, all of it: told of where no event did. Of a peer that
    /// tries thousands of ports, the most frequent by themselves and the others as one.
    pub fn handle_denials(&mut self, counted: impl Iterator<Item = (DenyKey, DenyEntry)>) {
        let before = std::mem::take(&mut self.denials);
        let mut news: BTreeMap<u32, Vec<(DenyKey, DenyEntry)>> = BTreeMap::new();
        for (key, entry) in counted {
            self.denials.insert(key, entry.packets);
            if before.get(&key) != Some(&entry.packets) {
                news.entry(key.peer).or_default().push((key, entry));
            }
        }
        for mut of_peer in news.into_values() {
            of_peer.sort_by_key(|(_, entry)| Reverse(entry.packets));
            let others = of_peer.split_off(of_peer.len().min(DENIALS_OF_ONE_PEER));
            let mut folded: BTreeMap<DenyKey, DenyEntry> = BTreeMap::new();
            for (key, entry) in others {
                let same = DenyKey {
                    port: Be16::new(0),
                    proto: 0,
                    ..key
                };
                let all = folded.entry(same).or_insert(DenyEntry {
                    packets: 0,
                    bytes: 0,
                    ..entry
                });
                if all.rule != entry.rule {
                    all.rule = RuleId::NONE;
                }
                all.packets += entry.packets;
                all.bytes += entry.bytes;
                all.first = all.first.min(entry.first);
                all.last = all.last.max(entry.last);
            }
            let told = of_peer.into_iter().chain(folded);
            self.records
                .extend(told.map(|(key, entry)| counted_denial(&key, &entry)));
        }
    }

    /// How many events of each kind were lost so far. What the walks find of them is told all the same.
    pub fn handle_lost(&mut self, lost: &BTreeMap<EventKind, u64>) {
        for (kind, total) in lost {
            let before = self.lost.insert(*kind, *total).unwrap_or(0);
            // The maps may have been made anew.
            let count = total.checked_sub(before).unwrap_or(*total);
            if count > 0 {
                self.losses.push_back(Loss { kind: *kind, count });
            }
        }
    }

    pub fn poll_loss(&mut self) -> Option<Loss> {
        self.losses.pop_front()
    }

    /// The next record.
    pub fn poll_record(&mut self) -> Option<Record> {
        self.records.pop_front()
    }

    /// The packet path counts a flow's packets in words, which wrap within the hour at a million a second:
    /// with the turns that they have made since the flow was last told of.
    fn unwrapped(&self, key: &FlowKey, opened: u64, counted: [u64; 2]) -> [u64; 2] {
        match self.flows.get(key) {
            Some(known) if known.record.first == opened => {
                let before = known.record.packets;
                std::array::from_fn(|way| {
                    // An event that waited tells of less than the walk that came before it.
                    let more = (counted[way] as u32).wrapping_sub(before[way] as u32);
                    before[way].saturating_add_signed(more.cast_signed().into())
                })
            }
            _ => counted,
        }
    }

    fn know(&mut self, record: Record) {
        let walk = Walk::Seen;
        self.flows.insert(record.key, Known { record, walk });
    }

    fn is_known_revoked(&self, key: &FlowKey) -> bool {
        let known = self.flows.get(key);
        known.is_some_and(|known| known.record.kind == Kind::Revoked)
    }
}

/// Under which the packet path counts what a record of a denial tells of. Of ICMP the record does not
/// say the type, so the table will tell of it once more.
fn deny_key(record: &Record) -> DenyKey {
    DenyKey {
        remote: record.remote,
        local: record.local,
        peer: record.peer,
        port: match record.direction {
            Direction::Ingress => record.key.local_port,
            Direction::Egress => record.key.remote_port,
        },
        proto: record.key.proto,
        direction: record.direction as u8,
        reason: record.reason.map_or(0, |reason| reason as u8),
        pad: 0,
        pad2: 0,
    }
}

fn counted_denial(key: &DenyKey, entry: &DenyEntry) -> Record {
    let direction = if key.direction == Direction::Egress as u8 {
        Direction::Egress
    } else {
        Direction::Ingress
    };
    let mut flow = FlowKey::NONE;
    flow.proto = key.proto;
    match direction {
        Direction::Ingress => flow.local_port = key.port,
        Direction::Egress => flow.remote_port = key.port,
    }
    let mut record = Record {
        kind: Kind::Denied,
        time: entry.last,
        first: entry.first,
        key: flow,
        direction,
        remote: key.remote,
        local: key.local,
        rule: entry.rule,
        peer: key.peer,
        reason: DropReason::from_number(key.reason),
        packets: [0; 2],
        bytes: [0; 2],
    };
    record.packets[direction as usize] = entry.packets;
    record.bytes[direction as usize] = entry.bytes;
    record
}
