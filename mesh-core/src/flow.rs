//! The flow log: what the packet path told of flows and denials, as records for people.
//!
//! The packet path tells each thing once and may be too busy even for that, so what is in its tables
//! is read besides, every few seconds: a flow that moved bytes, one that is gone without a word, and
//! denials that were counted but not told of. Whatever was lost on the way is a number in the log, and
//! never a record that is missing in silence.
//!
//! What makes it hard is that a flow has no name of its own. Its ports are used again while the table
//! still holds it, events wait while a walk goes by, and packets follow the one that closed it: so a flow
//! is its key and when it was opened, what tells of an older one is not heard, and an end is told a
//! moment late, when all its packets are counted.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use mesh_common::event::{DenyEntry, DenyKey, EventKind, FlowEvent};
use mesh_common::flow::{FlowEntry, FlowKey, flags};
use mesh_common::proto;
use mesh_common::{Direction, DropReason};

use crate::RuleId;

mod denials;
mod describe;
mod names;
mod query;
mod record;
#[cfg(test)]
mod tests;

pub use describe::{Described, End};
pub use names::Names;
pub use query::{Place, Query, Verdict, Who};
pub use record::{Kind, Record};

use denials::Denials;

/// Nanoseconds in which the last packets of a flow come by that its ends have closed.
const LAST_PACKETS: u64 = 1_000_000_000;

/// What was carried between this node and another, by [`Direction`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    pub packets: [u64; 2],
    pub bytes: [u64; 2],
}

/// Turns events and tables into records.
#[derive(Debug, Default)]
pub struct FlowLog {
    flows: BTreeMap<FlowKey, Known>,
    /// Flows whose end is to be told, and from when on: the soonest first.
    closing: VecDeque<(u64, FlowKey)>,
    denials: Denials,
    /// By peer.
    usage: BTreeMap<u32, Usage>,
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

/// A flow of the tables.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// As it was last seen, with the kind that it was last told of as.
    record: Record,
    /// Its bytes when it was last told of.
    told: Option<[u64; 2]>,
    stand: Stand,
    /// When it was told as revoked for the last time, or 0.
    revoked: u64,
    walk: Walk,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stand {
    Running,
    /// Closed by its ends, which is yet to be told.
    Closing,
    Closed,
    /// Its tombstone is in the table.
    Revoked,
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
        let record = Record {
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
            port: match kind {
                // Of ICMP they are no flags but the type.
                EventKind::Denied if is_icmp(event.key.proto) => event.tcp.into(),
                _ => service(&event.key, event.direction()),
            },
            direction: event.direction(),
            remote: event.remote,
            local: event.local,
            rule: event.rule,
            peer: event.peer,
            reason: event.reason(),
            packets: event.packets,
            bytes: event.bytes,
        };
        if record.kind == Kind::Denied {
            self.denials.told(&record);
            self.records.push_back(record);
            return;
        }
        let Some(known) = self.see(record) else {
            return;
        };
        match (record.kind, known.stand) {
            (Kind::Closed, Stand::Running) => self.close(record.key, record.time),
            (Kind::Revoked, Stand::Running) => self.tell(&record.key, Kind::Revoked, record.time),
            // Told late: it stays revoked.
            (Kind::Opened | Kind::Confirmed, Stand::Revoked) if record.time <= known.revoked => {
                self.records.push_back(record);
            }
            // Revoked and allowed again.
            (Kind::Opened | Kind::Confirmed, Stand::Running | Stand::Revoked) => {
                self.tell(&record.key, record.kind, record.time);
            }
            _ => {}
        }
    }

    /// One established flow, in a walk over all of them. `now` is of the packet path's clock.
    pub fn handle_flow(&mut self, key: FlowKey, entry: &FlowEntry, now: u64) {
        let Some(known) = self.handle_look(key, entry) else {
            return;
        };
        let time = entry.state.last_seen;
        let denied = entry.state.flags & flags::DENIED != 0;
        match known.stand {
            Stand::Running if denied => self.tell(&key, Kind::Revoked, now),
            Stand::Running if entry.state.is_closing() => self.close(key, time),
            Stand::Running if known.told != Some(known.record.bytes) => {
                self.tell(&key, Kind::Active, time);
            }
            Stand::Revoked if !denied => self.tell(&key, Kind::Active, time),
            _ => {}
        }
    }

    /// One flow that nobody has answered: of interest only if its opening was told, because a flood
    /// leaves many.
    pub fn handle_half_open(&mut self, key: FlowKey, entry: &FlowEntry, now: u64) {
        if self.flows.contains_key(&key) {
            self.handle_flow(key, entry, now);
        }
    }

    /// An established flow between two walks, for [`FlowLog::usage`]: nothing is told of it.
    pub fn handle_usage(&mut self, key: FlowKey, entry: &FlowEntry) {
        self.handle_look(key, entry);
    }

    /// As [`FlowLog::handle_usage`], for a flow that nobody has answered.
    pub fn handle_half_open_usage(&mut self, key: FlowKey, entry: &FlowEntry) {
        if self.flows.contains_key(&key) {
            self.handle_look(key, entry);
        }
    }

    /// A change of the policy has ended a flow, between these two times of the packet path's clock.
    pub fn handle_ended(&mut self, key: FlowKey, entry: &FlowEntry, [since, until]: [u64; 2]) {
        let Some(known) = self.handle_look(key, entry) else {
            return;
        };
        let is_news = match known.stand {
            Stand::Running => true,
            // Revoked before, it was allowed again, of which an event is on its way; but not if it is this very
            // change of which its own packet has told, or a walk.
            Stand::Revoked => known.revoked < since,
            Stand::Closing | Stand::Closed => false,
        };
        if is_news {
            self.tell(&key, Kind::Revoked, until);
        }
    }

    /// The next flow that its ends have closed and whose last packets have come by; then comes
    /// [`FlowLog::handle_closed`]. `now` is of the packet path's clock.
    pub fn poll_closed(&mut self, now: u64) -> Option<FlowKey> {
        while let Some((_, key)) = self.closing.pop_front_if(|(due, _)| *due <= now) {
            if self.is_closing(&key) {
                return Some(key);
            }
        }
        None
    }

    /// What the table says at last of a flow that was closed; `None` if it holds it no more.
    pub fn handle_closed(&mut self, key: FlowKey, entry: Option<&FlowEntry>) {
        if let Some(entry) = entry {
            self.handle_look(key, entry);
        }
        if self.is_closing(&key) {
            self.end(&key, 0);
        }
    }

    /// The walk is over: what it did not meet has ended in silence. `now` is of the packet path's
    /// clock.
    pub fn handle_walked(&mut self, now: u64) {
        self.forget(now, |known| known.walk == Walk::Unseen);
        for known in self.flows.values_mut() {
            known.walk = Walk::Unseen;
        }
    }

    /// The filter is taken away, and every flow with it. `now` is of the packet path's clock.
    pub fn handle_over(&mut self, now: u64) {
        self.forget(now, |_| true);
    }

    /// What the packet path counted of denials, all of it: told of where no event did. Of a peer that
    /// tries thousands of ports, the most frequent by themselves and the others as one.
    pub fn handle_denials(&mut self, counted: impl Iterator<Item = (DenyKey, DenyEntry)>) {
        self.records.extend(self.denials.news(counted));
    }

    /// How many events of each kind were lost since this was last said. What the walks find of them is told all the
    /// same.
    pub fn handle_lost(&mut self, lost: impl IntoIterator<Item = (EventKind, u64)>) {
        let losses = lost.into_iter().map(|(kind, count)| Loss { kind, count });
        self.losses.extend(losses);
    }

    pub fn poll_loss(&mut self) -> Option<Loss> {
        self.losses.pop_front()
    }

    /// The next record.
    pub fn poll_record(&mut self) -> Option<Record> {
        self.records.pop_front()
    }

    /// What was carried from and to each peer since the log began, or the flow that carried it did, if
    /// that was sooner: it does not shrink when flows end.
    pub fn usage(&self) -> &BTreeMap<u32, Usage> {
        &self.usage
    }

    /// Forgets what was carried from and to peers that are gone, unless their flows are still there.
    pub fn forget_usage(&mut self, is_gone: impl Fn(u32) -> bool) {
        let (_, with_flows) = self.mentioned();
        self.usage
            .retain(|peer, _| with_flows.contains(peer) || !is_gone(*peer));
    }

    /// The rules and peers that records of known flows will speak of.
    pub fn mentioned(&self) -> (BTreeSet<RuleId>, BTreeSet<u32>) {
        let records = || self.flows.values().map(|known| &known.record);
        (
            records().map(|record| record.rule).collect(),
            records().map(|record| record.peer).collect(),
        )
    }

    fn handle_look(&mut self, key: FlowKey, entry: &FlowEntry) -> Option<Known> {
        let denied = entry.state.flags & flags::DENIED != 0;
        self.see(Record {
            kind: Kind::Active,
            time: entry.state.last_seen,
            first: entry.opened,
            key,
            port: service(&key, entry.state.opened()),
            direction: entry.state.opened(),
            remote: entry.state.remote,
            local: entry.state.local,
            rule: entry.state.rule,
            peer: entry.state.peer,
            reason: denied.then_some(DropReason::Revoked),
            packets: entry.packets.map(u64::from),
            bytes: entry.bytes,
        })
    }

    /// Takes in what is said of a flow; returns what is known of it then, or `None` if another has taken
    /// its place.
    fn see(&mut self, mut record: Record) -> Option<Known> {
        let before = match self.flows.get(&record.key) {
            Some(known) if known.record.first > record.first => return None,
            Some(known) if known.record.first < record.first => {
                self.end(&record.key, record.first);
                None
            }
            known => known.copied(),
        };
        let mut usage = Usage {
            packets: record.packets,
            bytes: record.bytes,
        };
        let mut known = Known {
            record,
            told: None,
            stand: Stand::Running,
            revoked: 0,
            walk: Walk::Seen,
        };
        if let Some(before) = before {
            let (packets, bytes) = (before.record.packets, before.record.bytes);
            record.packets = unwrapped(packets, record.packets);
            // An event that waited tells of less than the walk that came before it.
            record.bytes = std::array::from_fn(|way| record.bytes[way].max(bytes[way]));
            usage.packets = std::array::from_fn(|way| record.packets[way] - packets[way]);
            usage.bytes = std::array::from_fn(|way| record.bytes[way] - bytes[way]);
            record.kind = before.record.kind;
            if before.stand == Stand::Closing {
                record.time = before.record.time;
            }
            known = Known {
                record,
                walk: Walk::Seen,
                ..before
            };
        }
        // A tombstone counts what it refuses.
        let carried = record.reason.is_none().then_some(usage);
        let total = self.usage.entry(record.peer).or_default();
        for (way, usage) in carried.iter().flat_map(|usage| [(0, usage), (1, usage)]) {
            total.packets[way] = total.packets[way].saturating_add(usage.packets[way]);
            total.bytes[way] = total.bytes[way].saturating_add(usage.bytes[way]);
        }
        self.flows.insert(record.key, known);
        Some(known)
    }

    fn tell(&mut self, key: &FlowKey, kind: Kind, time: u64) {
        let Some(known) = self.flows.get_mut(key) else {
            return;
        };
        known.stand = match kind {
            Kind::Revoked => Stand::Revoked,
            Kind::Closed => Stand::Closed,
            _ => Stand::Running,
        };
        if kind == Kind::Revoked {
            known.revoked = time;
        }
        known.told = Some(known.record.bytes);
        known.record.kind = kind;
        known.record.time = time;
        known.record.reason = (kind == Kind::Revoked).then_some(DropReason::Revoked);
        self.records.push_back(known.record);
    }

    fn is_closing(&self, key: &FlowKey) -> bool {
        let known = self.flows.get(key);
        known.is_some_and(|known| known.stand == Stand::Closing)
    }

    /// The flow's ends have closed it: its last packets may be on their way.
    fn close(&mut self, key: FlowKey, time: u64) {
        if let Some(known) = self.flows.get_mut(&key) {
            known.stand = Stand::Closing;
            known.record.time = time;
            self.closing
                .push_back((time.saturating_add(LAST_PACKETS), key));
        }
    }

    fn forget(&mut self, now: u64, is_gone: impl Fn(&Known) -> bool) {
        let gone = self.flows.iter().filter(|(_, known)| is_gone(known));
        let gone: Vec<_> = gone.map(|(key, _)| *key).collect();
        for key in gone {
            self.end(&key, now);
            self.flows.remove(&key);
        }
    }

    /// The flow is over: `now`, unless it was closed.
    fn end(&mut self, key: &FlowKey, now: u64) {
        let Some(known) = self.flows.get(key) else {
            return;
        };
        match known.stand {
            Stand::Running => self.tell(key, Kind::Idle, now),
            Stand::Closing => self.tell(key, Kind::Closed, known.record.time),
            // It was told; that the table forgets it is no news.
            Stand::Closed | Stand::Revoked => {}
        }
    }
}

/// The port of a flow that was opened in this direction. Of ICMP only echoes are flows.
fn service(key: &FlowKey, direction: Direction) -> u16 {
    match (key.proto, direction) {
        (proto::ICMP, _) => ECHO_REQUEST.into(),
        (proto::ICMPV6, _) => ECHO_REQUEST_V6.into(),
        (_, Direction::Ingress) => key.local_port.get(),
        (_, Direction::Egress) => key.remote_port.get(),
    }
}

const fn is_icmp(proto: u8) -> bool {
    matches!(proto, proto::ICMP | proto::ICMPV6)
}

/// RFC 792 and RFC 4443.
const ECHO_REQUEST: u8 = 8;
const ECHO_REQUEST_V6: u8 = 128;

/// The packet path counts a flow's packets in words, which wrap within the hour at a million a second:
/// with the turns that they have made since they were last seen.
fn unwrapped(before: [u64; 2], counted: [u64; 2]) -> [u64; 2] {
    std::array::from_fn(|way| {
        let more = (counted[way] as u32).wrapping_sub(before[way] as u32);
        // An event that waited tells of less than the walk that came before it.
        before[way] + u64::try_from(more.cast_signed()).unwrap_or(0)
    })
}
