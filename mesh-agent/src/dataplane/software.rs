//! The packet filter in process: the same verdict where the kernel takes no programs.
//!
//! The tables are bounded as the kernel's are, and full in the same way: half-open flows are evicted,
//! oldest first, and a flow that finds no room among the established stays half-open. What each peer
//! uses is bounded alike.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mesh_common::budget::{Bucket, ICMP_ERRORS, PeerLoad};
use mesh_common::flow::{
    FRAGMENT, FlowEntry, FlowKey, FlowState, FragmentEntry, FragmentKey, PICKUP, Stage, flags,
    is_older,
};
use mesh_common::maps::{Count, FLOW_CAPACITY, FRAGMENT_CAPACITY};
use mesh_common::packet::{self, Fragment, Kind, Slice};
use mesh_common::policy::PolicyPrefix;
use mesh_common::verdict::{Lookup, complete, prevailing, rate};
use mesh_common::{
    Address, Direction, Effect, Facts, IdentityEntry, PolicyEntry, PolicyKey, Verdict, decide, tcp,
};
use mesh_core::dataplane::Tables;
use tokio::sync::mpsc;

use super::{Counters, EVENT_QUEUE, EventKind, FlowEvent};
use told::{Packet, Told};

#[cfg(test)]
mod tests;
mod told;
mod walk;

/// A filter that any thread may ask.
#[derive(Debug)]
pub struct Filter {
    engine: Mutex<Engine>,
    started: Instant,
}

impl Default for Filter {
    fn default() -> Self {
        Self::new()
    }
}

impl Filter {
    /// Drops everything until tables are applied.
    pub fn new() -> Self {
        Self {
            engine: Mutex::new(Engine {
                pickup_until: PICKUP,
                ..Engine::default()
            }),
            started: Instant::now(),
        }
    }

    /// From here on these tables decide, over running flows too.
    pub fn apply(&self, tables: &Tables) {
        self.engine().apply(tables);
    }

    /// Judges a packet that starts at its IP header. A SYN that passes may have its MSS lowered.
    pub fn judge(&self, direction: Direction, packet: &mut [u8]) -> Verdict {
        let now = self.now();
        self.engine().judge(direction, packet, now)
    }

    pub fn is_full(&self) -> bool {
        self.engine().is_full
    }

    pub fn counters(&self) -> Counters {
        self.engine().counters()
    }

    /// How many events of each kind were lost since this was last asked.
    pub fn losses(&self) -> BTreeMap<EventKind, u64> {
        self.engine().told.losses()
    }

    /// What becomes of flows and packets from now on. Whoever asks last gets them.
    pub fn events(&self) -> mpsc::Receiver<FlowEvent> {
        let (sender, receiver) = mpsc::channel(EVENT_QUEUE);
        self.engine().told.events = Some(sender);
        receiver
    }

    /// Forgets flows whose time is over; returns how many stand. To be called every few seconds.
    pub fn sweep(&self) -> usize {
        let now = self.now();
        self.engine().sweep(now)
    }

    fn engine(&self) -> MutexGuard<'_, Engine> {
        // A panic elsewhere leaves at worst a flow half written, which grants nothing.
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// The filter without clock and lock.
#[derive(Debug, Default)]
pub struct Engine {
    generation: u32,
    exact: HashMap<Address, IdentityEntry>,
    /// By prefix length.
    cidr: BTreeMap<u32, HashMap<Address, IdentityEntry>>,
    rows: HashMap<PolicyPrefix, PolicyEntry>,
    mss: [u16; 2],
    established: HashMap<FlowKey, FlowEntry>,
    half_open: HashMap<FlowKey, FlowEntry>,
    /// Keys of `half_open` by age; some may be gone.
    ages: VecDeque<FlowKey>,
    fragments: HashMap<FragmentKey, FragmentEntry>,
    loads: HashMap<u32, PeerLoad>,
    counters: Counters,
    told: Told,
    /// [`mesh_common::maps::Config::pickup_until`].
    pub pickup_until: u64,
    /// The last sweep found so many established flows that no more are taken in.
    is_full: bool,
}

/// Established flows that were opened alike and have the same peer.
pub const SHARE: i32 = FLOW_CAPACITY as i32 / 4;

impl Engine {
    pub fn apply(&mut self, tables: &Tables) {
        self.exact.clear();
        self.cidr.clear();
        for (prefix, entry) in &tables.identities {
            if prefix.len == 128 {
                self.exact.insert(prefix.address, *entry);
            } else {
                let nets = self.cidr.entry(prefix.len).or_default();
                nets.insert(prefix.address, *entry);
            }
        }
        self.rows = tables.rows.iter().map(|(k, v)| (*k, *v)).collect();
        self.mss = [tables.settings.mss_v4, tables.settings.mss_v6];
        self.counters
            .rules
            .retain(|rule, _| tables.rules.contains(rule));
        for rule in &tables.rules {
            self.counters.rules.entry(*rule).or_default();
        }
        self.generation += 1;
    }

    /// `now` is in nanoseconds of any clock that does not go back.
    pub fn judge(&mut self, direction: Direction, packet: &mut [u8], now: u64) -> Verdict {
        let length = packet.len() as u64;
        let (mut facts, mut verdict) = match packet::parse(&Slice(packet), direction) {
            Ok(mut facts) => match complete(&mut facts, now, self) {
                Ok(()) => (facts, decide(&facts, now, self)),
                Err(reason) => (facts, Verdict::refused(reason)),
            },
            Err(reason) => {
                let facts = Facts::refused(&Slice(packet), direction);
                (facts, Verdict::refused(reason))
            }
        };
        if verdict.is_nameless(&facts) {
            verdict.name(&facts, self);
        }
        let entry = self.carry_out(&facts, &verdict, length, now);
        self.count(direction, &verdict, length);
        if let Some(kind) = verdict.event {
            if kind == EventKind::Denied {
                facts.forget_quoted();
            }
            let packet = Packet {
                key: &facts.key,
                direction,
                port: facts.port,
                tcp: facts.tcp,
                length,
                now,
                verdict: &verdict,
            };
            let load = self.loads.entry(verdict.state.peer).or_default();
            match kind {
                EventKind::Denied => self.told.deny(&packet, load),
                kind => self.told.flow(kind, &packet, &entry, load),
            }
        }
        if verdict.passes() {
            self.after(&facts, packet, now);
        }
        verdict
    }

    /// Remembers what the verdict wants remembered; returns the flow as it is then.
    fn carry_out(&mut self, facts: &Facts, verdict: &Verdict, length: u64, now: u64) -> FlowEntry {
        let (key, peer, opened) = (&facts.key, verdict.state.peer, verdict.state.opened());
        let fresh = FlowEntry {
            opened: now,
            ..FlowEntry::default()
        };
        let known = || {
            self.established
                .get(key)
                .or_else(|| self.half_open.get(key))
        };
        let mut entry = match verdict.effect {
            Effect::Nothing => return fresh,
            Effect::Report => {
                let load = self.loads.entry(peer).or_default();
                load.errors = load.errors.taken(now, &ICMP_ERRORS);
                return fresh;
            }
            Effect::Open => {
                let tokens = &mut self.loads.entry(peer).or_default().new[opened as usize];
                *tokens = tokens.taken(now, rate(opened));
                fresh
            }
            _ => known().copied().unwrap_or(fresh),
        };
        entry.state = verdict.state;
        let way = facts.direction as usize;
        entry.packets[way] = entry.packets[way].wrapping_add(1);
        entry.bytes[way] = entry.bytes[way].wrapping_add(length);
        let is_confirmed = match verdict.effect {
            Effect::TouchEstablished | Effect::WriteEstablished => true,
            // One that was running already.
            Effect::Open => {
                verdict.state.flags & flags::CONFIRMED != 0 && !self.is_share_taken(peer, opened)
            }
            _ => false,
        };
        let before = self.established.remove(key);
        if let Some(before) = before {
            self.held(&before.state, u32::MAX);
        }
        if is_confirmed && self.established.len() < FLOW_CAPACITY as usize {
            self.half_open.remove(key);
            self.established.insert(*key, entry);
            self.held(&entry.state, 1);
        } else {
            self.put_half_open(*key, entry);
        }
        entry
    }

    /// Counts an established flow in or, by the greatest number, out.
    fn held(&mut self, state: &FlowState, by: u32) {
        let added = &mut self.loads.entry(state.peer).or_default().added;
        let added = &mut added[state.opened() as usize];
        *added = added.wrapping_add(by);
    }

    fn put_half_open(&mut self, key: FlowKey, entry: FlowEntry) {
        if self.half_open.insert(key, entry).is_some() {
            return;
        }
        self.ages.push_back(key);
        while self.half_open.len() > FLOW_CAPACITY as usize {
            match self.ages.pop_front() {
                Some(oldest) => self.half_open.remove(&oldest),
                None => break,
            };
        }
        // Keys of flows that moved on pile up in front of those that did not.
        if self.ages.len() > 2 * FLOW_CAPACITY as usize {
            self.ages.retain(|key| self.half_open.contains_key(key));
        }
    }

    fn count(&mut self, direction: Direction, verdict: &Verdict, length: u64) {
        let one = Count {
            packets: 1,
            bytes: length,
        };
        let counters = &mut self.counters;
        match verdict.drop {
            None => *counters.passed.entry(direction).or_default() += one,
            Some(reason) => *counters.dropped.entry((direction, reason)).or_default() += one,
        }
        if verdict.is_decision()
            && let Some(rule) = counters.rules.get_mut(&verdict.rule)
        {
            *rule += one;
        }
    }

    fn after(&mut self, facts: &Facts, packet: &mut [u8], now: u64) {
        if facts.fragment == Fragment::First {
            if self.fragments.len() >= FRAGMENT_CAPACITY as usize {
                self.fragments
                    .retain(|_, entry| !is_older(now, entry.last_seen, FRAGMENT));
            }
            if self.fragments.len() < FRAGMENT_CAPACITY as usize {
                let entry = FragmentEntry {
                    last_seen: now,
                    remote_port: facts.key.remote_port,
                    local_port: facts.key.local_port,
                    proto: facts.key.proto,
                    pad: [0; 3],
                };
                self.fragments.insert(facts.fragment_key(), entry);
            }
        }
        if facts.kind == Kind::Tcp && facts.tcp & tcp::SYN != 0 {
            let max = self.mss[usize::from(!facts.remote.is_mapped())];
            tcp::clamp(packet, usize::from(facts.transport), max);
        }
    }

    pub fn sweep(&mut self, now: u64) -> usize {
        let is_over = |key: &FlowKey, entry: &FlowEntry| entry.state.is_expired(key.proto, now);
        let over: Vec<_> = self
            .established
            .extract_if(|key, entry| is_over(key, entry))
            .collect();
        for (_, entry) in over {
            self.held(&entry.state, u32::MAX);
        }
        self.half_open.retain(|key, entry| !is_over(key, entry));
        self.ages.retain(|key| self.half_open.contains_key(key));
        self.fragments
            .retain(|_, entry| !is_older(now, entry.last_seen, FRAGMENT));
        self.loads
            .retain(|_, load| load.added != [0; 2] || !load.is_idle(now));
        // Some room must be there before it opens again.
        let sixteenths = if self.is_full { 14 } else { 15 };
        self.is_full = self.established.len() >= FLOW_CAPACITY as usize / 16 * sixteenths;
        self.established.len() + self.half_open.len()
    }

    pub fn counters(&self) -> Counters {
        let mut counters = self.counters.clone();
        let lost = EventKind::ALL
            .into_iter()
            .map(|kind| (kind, self.told.lost[kind as usize]));
        counters.events_lost = lost.collect();
        counters
    }

    /// What the peer with this number has used, to be looked at and changed by tests.
    pub fn load(&mut self, peer: u32) -> &mut PeerLoad {
        self.loads.entry(peer).or_default()
    }
}

impl Lookup for Engine {
    fn generation(&self) -> u32 {
        self.generation
    }

    fn flow(&self, stage: Stage, key: &FlowKey) -> Option<FlowState> {
        let table = match stage {
            Stage::HalfOpen => &self.half_open,
            Stage::Established => &self.established,
        };
        table.get(key).map(|entry| entry.state)
    }

    fn fragment(&self, key: &FragmentKey) -> Option<FragmentEntry> {
        self.fragments.get(key).copied()
    }

    fn identity(&self, address: &Address) -> IdentityEntry {
        let wider = || {
            self.cidr.iter().rev().find_map(|(len, nets)| {
                let len = u8::try_from(*len).unwrap_or(u8::MAX);
                nets.get(&address.masked(len))
            })
        };
        let entry = self.exact.get(address).or_else(wider);
        entry.copied().unwrap_or(IdentityEntry::UNKNOWN)
    }

    fn policy(&self, key: &PolicyKey) -> PolicyEntry {
        let row = |key: &PolicyKey| {
            mesh_core::dataplane::longest(key, |prefix| self.rows.get(prefix).copied())
        };
        prevailing(row(key), row(&key.of_anybody()))
    }

    fn new_flows(&self, peer: u32, opened: Direction) -> Bucket {
        let load = self.loads.get(&peer);
        load.map_or_else(Bucket::default, |load| load.new[opened as usize])
    }

    fn is_share_taken(&self, peer: u32, opened: Direction) -> bool {
        let load = self.loads.get(&peer);
        self.is_full || load.is_some_and(|load| load.added[opened as usize].cast_signed() >= SHARE)
    }

    fn icmp_errors(&self, peer: u32) -> Bucket {
        let load = self.loads.get(&peer);
        load.map_or_else(Bucket::default, |load| load.errors)
    }

    fn pickup_until(&self) -> u64 {
        self.pickup_until
    }
}
