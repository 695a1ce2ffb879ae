//! The packet filter in process: the same verdict where the kernel takes no programs.
//!
//! The tables are bounded as the kernel's are, and full in the same way: half-open flows are evicted,
//! oldest first, and a flow that finds no room among the established stays half-open.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mesh_common::flow::{
    FRAGMENT, FlowEntry, FlowKey, FlowState, FragmentEntry, FragmentKey, Stage, is_older,
};
use mesh_common::maps::{Count, FLOW_CAPACITY, FRAGMENT_CAPACITY};
use mesh_common::packet::{self, Fragment, Kind, Slice};
use mesh_common::policy::PolicyPrefix;
use mesh_common::verdict::{Lookup, complete};
use mesh_common::{
    Address, Direction, Effect, Facts, IdentityEntry, PolicyEntry, PolicyKey, Verdict, decide, tcp,
};
use mesh_core::dataplane::Tables;
use tokio::sync::mpsc;

use super::{Counters, EVENT_QUEUE, EventKind, FlowEvent};

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
            engine: Mutex::new(Engine::default()),
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

    pub fn counters(&self) -> Counters {
        self.engine().counters.clone()
    }

    /// What becomes of flows and packets from now on. Whoever asks last gets them.
    pub fn events(&self) -> mpsc::Receiver<FlowEvent> {
        let (sender, receiver) = mpsc::channel(EVENT_QUEUE);
        self.engine().events = Some(sender);
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
    counters: Counters,
    events: Option<mpsc::Sender<FlowEvent>>,
}

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
        let mut facts = match packet::parse(&Slice(packet), direction) {
            Ok(facts) => facts,
            Err(reason) => {
                let verdict = Verdict::refused(reason);
                self.count(direction, &verdict, length);
                self.report(&FlowKey::NONE, direction, 0, &verdict, length, now);
                return verdict;
            }
        };
        let verdict = match complete(&mut facts, now, self) {
            Ok(()) => decide(&facts, now, self),
            Err(reason) => Verdict::refused(reason),
        };
        self.carry_out(&facts, &verdict, length);
        self.count(direction, &verdict, length);
        if verdict.passes() {
            self.after(&facts, packet, now);
        } else {
            self.report(&facts.key, direction, facts.tcp, &verdict, length, now);
        }
        verdict
    }

    fn carry_out(&mut self, facts: &Facts, verdict: &Verdict, length: u64) {
        let key = &facts.key;
        let stage = match verdict.effect {
            Effect::Nothing => return,
            Effect::TouchHalfOpen | Effect::WriteHalfOpen => Stage::HalfOpen,
            Effect::TouchEstablished | Effect::WriteEstablished => Stage::Established,
        };
        let established = self.established.get(key);
        let old = established.or_else(|| self.half_open.get(key)).copied();
        let mut entry = old.unwrap_or_default();
        entry.state = verdict.state;
        let way = facts.direction as usize;
        entry.packets[way] = entry.packets[way].wrapping_add(1);
        entry.bytes[way] = entry.bytes[way].wrapping_add(length);
        let full = self.established.len() >= FLOW_CAPACITY as usize;
        match stage {
            Stage::Established if !full || self.established.contains_key(key) => {
                self.half_open.remove(key);
                self.established.insert(*key, entry);
            }
            _ => {
                self.established.remove(key);
                self.put_half_open(*key, entry);
            }
        }
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
        let decides = !verdict.passes() || verdict.effect == Effect::WriteHalfOpen;
        if decides && let Some(rule) = counters.rules.get_mut(&verdict.rule) {
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

    fn report(
        &mut self,
        key: &FlowKey,
        direction: Direction,
        tcp: u8,
        verdict: &Verdict,
        length: u64,
        now: u64,
    ) {
        let Some(events) = &self.events else {
            return;
        };
        let mut event = FlowEvent {
            time: now,
            first: now,
            bytes: [0; 2],
            packets: [0; 2],
            key: *key,
            remote: verdict.remote,
            local: verdict.local,
            rule: verdict.rule,
            peer: verdict.state.peer,
            kind: EventKind::Denied as u8,
            direction: direction as u8,
            reason: verdict.drop.map_or(0, |reason| reason as u8),
            tcp,
            length: u32::try_from(length).unwrap_or(u32::MAX),
        };
        event.bytes[direction as usize] = length;
        event.packets[direction as usize] = 1;
        match events.try_send(event) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                let lost = self.counters.events_lost.entry(EventKind::Denied);
                *lost.or_default() += 1;
            }
            Err(mpsc::error::TrySendError::Closed(_)) => self.events = None,
        }
    }

    pub fn sweep(&mut self, now: u64) -> usize {
        let alive = |stage| {
            move |key: &FlowKey, entry: &mut FlowEntry| {
                !entry.state.is_expired(key.proto, stage, now)
            }
        };
        self.established.retain(alive(Stage::Established));
        self.half_open.retain(alive(Stage::HalfOpen));
        self.ages.retain(|key| self.half_open.contains_key(key));
        self.fragments
            .retain(|_, entry| !is_older(now, entry.last_seen, FRAGMENT));
        self.established.len() + self.half_open.len()
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
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
        mesh_core::dataplane::longest(key, |prefix| self.rows.get(prefix).copied())
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use mesh_common::{DropReason, Identity, RuleId};

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn udp(from: [u8; 4], to: [u8; 4], ports: [u16; 2]) -> Vec<u8> {
        let mut packet = vec![0; 28];
        packet[0] = 0x45;
        packet[9] = 17;
        packet[12..16].copy_from_slice(&from);
        packet[16..20].copy_from_slice(&to);
        packet[20..22].copy_from_slice(&ports[0].to_be_bytes());
        packet[22..24].copy_from_slice(&ports[1].to_be_bytes());
        packet
    }

    /// 100.64.0.1 is this node; 100.64.0.2 may open UDP towards it.
    fn tables() -> Tables {
        let entry = |number, flags, peer| IdentityEntry {
            identity: Identity(number),
            flags,
            peer,
        };
        let host = |last| mesh_common::addr::Prefix {
            len: 128,
            address: Address::from(std::net::IpAddr::from(Ipv4Addr::new(100, 64, 0, last))),
        };
        let rule = RuleId(7);
        let row = PolicyPrefix {
            len: PolicyPrefix::ANY_PORT,
            key: PolicyKey::new(Identity(17), Identity(16), Direction::Ingress, 17, 0),
        };
        Tables {
            identities: BTreeMap::from([
                (host(1), entry(16, IdentityEntry::LOCAL, 0)),
                (host(2), entry(17, 0, 2)),
            ]),
            rows: BTreeMap::from([(row, PolicyEntry::accept(rule))]),
            rules: [rule].into(),
            ..Tables::default()
        }
    }

    const ME: [u8; 4] = [100, 64, 0, 1];
    const PEER: [u8; 4] = [100, 64, 0, 2];

    #[test]
    fn without_tables_everything_is_dropped() {
        let filter = Filter::new();
        let verdict = filter.judge(Direction::Ingress, &mut udp(PEER, ME, [1, 2]));
        assert_eq!(verdict.drop, Some(DropReason::NoPolicy));
    }

    #[test]
    fn an_answer_passes_and_what_is_unsolicited_does_not() {
        let mut engine = Engine::default();
        engine.apply(&tables());
        let out = engine.judge(Direction::Egress, &mut udp(ME, PEER, [53, 4000]), 0);
        assert_eq!(out.drop, Some(DropReason::NoRule));
        let ask = engine.judge(Direction::Ingress, &mut udp(PEER, ME, [4000, 53]), 0);
        assert!(ask.passes());
        let answer = engine.judge(Direction::Egress, &mut udp(ME, PEER, [53, 4000]), SECOND);
        assert!(answer.passes());
        assert_eq!(answer.rule, RuleId(7));
        let late = engine.judge(
            Direction::Egress,
            &mut udp(ME, PEER, [53, 4000]),
            200 * SECOND,
        );
        assert_eq!(late.drop, Some(DropReason::NoRule));
    }

    #[test]
    fn an_edit_ends_a_running_flow_and_its_revert_revives_it() {
        let mut engine = Engine::default();
        let allowed = tables();
        let denied = Tables {
            rows: BTreeMap::new(),
            ..allowed.clone()
        };
        engine.apply(&allowed);
        let mut packet = udp(PEER, ME, [4000, 53]);
        assert!(engine.judge(Direction::Ingress, &mut packet, 0).passes());
        engine.apply(&denied);
        let verdict = engine.judge(Direction::Ingress, &mut packet, 1);
        assert_eq!(verdict.drop, Some(DropReason::Revoked));
        engine.apply(&allowed);
        assert!(engine.judge(Direction::Ingress, &mut packet, 2).passes());
    }

    #[test]
    fn a_flood_of_new_flows_evicts_half_open_ones_only() {
        let mut engine = Engine::default();
        engine.apply(&tables());
        engine.judge(Direction::Ingress, &mut udp(PEER, ME, [1, 53]), 0);
        engine.judge(Direction::Egress, &mut udp(ME, PEER, [53, 1]), 0);
        for n in 0..FLOW_CAPACITY + 1_000 {
            let ports = [(n >> 8) as u16, 1_000 + (n & 0xff) as u16];
            let verdict = engine.judge(Direction::Ingress, &mut udp(PEER, ME, ports), 1);
            assert!(verdict.passes());
        }
        assert_eq!(engine.half_open.len(), FLOW_CAPACITY as usize);
        assert_eq!(engine.established.len(), 1);
        assert_eq!(engine.sweep(31 * SECOND), 1);
    }

    #[test]
    fn counters_and_events_tell_the_same_story() {
        let filter = Filter::new();
        filter.apply(&tables());
        let mut events = filter.events();
        filter.judge(Direction::Ingress, &mut udp(PEER, ME, [4000, 53]));
        filter.judge(
            Direction::Ingress,
            &mut udp([100, 64, 0, 9], ME, [4000, 53]),
        );
        let counters = filter.counters();
        let reason = (Direction::Ingress, DropReason::UnknownIdentity);
        assert_eq!(counters.dropped[&reason].packets, 1);
        assert_eq!(counters.passed[&Direction::Ingress].packets, 1);
        assert_eq!(counters.rules[&RuleId(7)].packets, 1);
        let event = events.try_recv().unwrap();
        assert_eq!(event.reason(), Some(DropReason::UnknownIdentity));
        assert_eq!(event.key.remote.to_string(), "100.64.0.9");
        assert!(events.try_recv().is_err());
    }
}
