//! What the filter in process tells, and what it only counts: the same as the programs do.

use std::collections::{BTreeMap, HashMap};

use mesh_common::budget::{Bucket, PeerLoad, Rate};
use mesh_common::event::{DenyEntry, DenyKey, KIND_RATE, PEER_RATE};
use mesh_common::flow::{FlowEntry, FlowKey};
use mesh_common::maps::DENY_CAPACITY;
use mesh_common::proto;
use mesh_common::{Be16, Direction, Verdict};
use tokio::sync::mpsc;

use crate::dataplane::{EventKind, FlowEvent};

/// What an event tells of a packet.
#[derive(Debug)]
pub(super) struct Packet<'a> {
    pub(super) key: &'a FlowKey,
    pub(super) direction: Direction,
    /// What policy calls the port.
    pub(super) port: u16,
    pub(super) tcp: u8,
    pub(super) length: u64,
    pub(super) now: u64,
    pub(super) verdict: &'a Verdict,
}

#[derive(Debug, Default)]
pub(super) struct Told {
    pub(super) events: Option<mpsc::Sender<FlowEvent>>,
    tokens: [Bucket; EventKind::ALL.len()],
    pub(super) denials: HashMap<DenyKey, DenyEntry>,
    pub(super) lost: [u64; EventKind::ALL.len()],
    /// How many of them when last asked.
    lost_told: [u64; EventKind::ALL.len()],
}

impl Told {
    /// How many events of each kind were lost since this was last asked.
    pub(super) fn losses(&mut self) -> BTreeMap<EventKind, u64> {
        let told = std::mem::replace(&mut self.lost_told, self.lost);
        let news = EventKind::ALL
            .into_iter()
            .map(|kind| (kind, self.lost[kind as usize] - told[kind as usize]));
        news.filter(|(_, count)| *count > 0).collect()
    }

    /// Tells what became of the flow that `entry` tells of.
    pub(super) fn flow(
        &mut self,
        kind: EventKind,
        packet: &Packet<'_>,
        entry: &FlowEntry,
        load: &mut PeerLoad,
    ) {
        let event = FlowEvent {
            direction: entry.state.opened() as u8,
            first: entry.opened,
            bytes: entry.bytes,
            packets: entry.packets.map(u64::from),
            tcp: 0,
            ..packet.event(kind)
        };
        self.send(kind, event, load, packet.now);
    }

    /// Counts a denied packet, and tells of it now and then.
    pub(super) fn deny(&mut self, packet: &Packet<'_>, load: &mut PeerLoad) {
        let same = DenyKey {
            remote: packet.verdict.remote,
            local: packet.verdict.local,
            peer: packet.verdict.state.peer,
            port: Be16::new(packet.port),
            proto: packet.key.proto,
            direction: packet.direction as u8,
            reason: packet.reason(),
            pad: 0,
            pad2: 0,
        };
        if self.denials.len() >= DENY_CAPACITY as usize && !self.denials.contains_key(&same) {
            // Many at once, so that a scan of ports does not look through all of them for each.
            let mut room = self.denials.len() / 8;
            let mut lasts: Vec<u64> = self.denials.values().map(|entry| entry.last).collect();
            let (_, newest_gone, _) = lasts.select_nth_unstable(room);
            self.denials.retain(|_, entry| {
                let stays = entry.last > *newest_gone || room == 0;
                room -= usize::from(!stays);
                stays
            });
        }
        let entry = self.denials.entry(same).or_insert_with(|| DenyEntry {
            first: packet.now,
            ..DenyEntry::default()
        });
        let is_news = entry.is_news(entry.packets + 1, packet.now);
        entry.packets += 1;
        entry.bytes += packet.length;
        entry.last = packet.now;
        entry.rule = packet.verdict.rule;
        if !is_news {
            return;
        }
        entry.told = DenyEntry::tick(packet.now);
        let mut event = FlowEvent {
            first: entry.first,
            tcp: match packet.key.proto {
                proto::ICMP | proto::ICMPV6 => packet.port as u8,
                _ => packet.tcp,
            },
            ..packet.event(EventKind::Denied)
        };
        event.bytes[packet.direction as usize] = entry.bytes;
        event.packets[packet.direction as usize] = entry.packets;
        self.send(EventKind::Denied, event, load, packet.now);
    }

    fn send(&mut self, kind: EventKind, event: FlowEvent, load: &mut PeerLoad, now: u64) {
        let Some(events) = &self.events else {
            return;
        };
        let is_heard = (kind == EventKind::Revoked || take(&mut load.events, now, &PEER_RATE))
            && take(&mut self.tokens[kind as usize], now, &KIND_RATE);
        if !is_heard {
            self.lost[kind as usize] += 1;
            return;
        }
        match events.try_send(event) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => self.lost[kind as usize] += 1,
            Err(mpsc::error::TrySendError::Closed(_)) => self.events = None,
        }
    }
}

impl Packet<'_> {
    fn reason(&self) -> u8 {
        self.verdict.drop.map_or(0, |reason| reason as u8)
    }

    fn event(&self, kind: EventKind) -> FlowEvent {
        FlowEvent {
            time: self.now,
            first: self.now,
            bytes: [0; 2],
            packets: [0; 2],
            key: *self.key,
            remote: self.verdict.remote,
            local: self.verdict.local,
            rule: self.verdict.rule,
            peer: self.verdict.state.peer,
            kind: kind as u8,
            direction: self.direction as u8,
            reason: self.reason(),
            tcp: self.tcp,
            length: u32::try_from(self.length).unwrap_or(u32::MAX),
        }
    }
}

fn take(bucket: &mut Bucket, now: u64, rate: &Rate) -> bool {
    let has = bucket.has(now, rate);
    if has {
        *bucket = bucket.taken(now, rate);
    }
    has
}
