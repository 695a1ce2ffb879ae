//! The agent's state: the one thing that its event loop drives.
//!
//! Inputs are what the user wants, what the coordinator says, what actuators report and what time it
//! is; outputs are messages to the coordinator, the newest plan for the actuators and what the disk
//! should remember. The state never waits and never does.
//!
//! Two clocks meet here. Keys expire by the coordinator's clock, carried on by this machine's uptime:
//! neither a wrong local clock nor an unreachable coordinator makes an expired key good again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use crate::control::{
    Accepted, Applied, Chain, Enroll, Event, Failure, Hello, Keys, Membership, Notice, Refused,
    Report, Session, Transmit,
};
use crate::desired::{self, Access, Desired, Local};
use crate::health::{Condition, Health};
use crate::key::{MachinePublic, NodeKey};
use crate::netmap::Netmap;
use crate::node::{Epoch, Generation, UnixTime};
use crate::routes::{self, LocalPrefix};

mod conditions;
#[cfg(test)]
mod tests;

/// How long the coordinator may be away before people are told.
const UNREACHABLE_AFTER: Duration = Duration::from_secs(10);
/// How long without the coordinator before the policy in force is called stale.
const STALE_AFTER: Duration = Duration::from_secs(3600);

/// What the user chose; survives restarts.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Prefs {
    /// `mesh up` was said last, not `mesh down`.
    pub up: bool,
    /// The join string; parsed where it is used.
    pub join: String,
    /// The coordinator's whole key, once it was seen behind the pin.
    pub coordinator: Option<MachinePublic>,
    pub advertised_routes: BTreeSet<IpNet>,
}

/// All that a restart needs besides the keys.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    pub prefs: Prefs,
    pub membership: Option<Membership>,
    pub chain: Option<Chain>,
    /// The coordinator's clock, now.
    pub clock: Option<UnixTime>,
}

/// What has a plan to apply.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Actuator {
    WireGuard,
    Routes,
    Dataplane,
    Dns,
}

impl Actuator {
    pub const ALL: [Self; 4] = [Self::WireGuard, Self::Routes, Self::Dataplane, Self::Dns];

    /// The coordinator's word counts as enforced when all of these have applied it.
    fn enforces(self) -> bool {
        match self {
            Self::WireGuard | Self::Routes | Self::Dataplane => true,
            Self::Dns => false,
        }
    }
}

/// Something for the shell to do.
#[derive(Clone, Debug)]
pub enum Output {
    /// Replaces the plan before; `None`: leave the mesh, no device at all.
    Desired(Option<Arc<Desired>>),
    /// [`State::memory`] has changed.
    Remember,
    /// For the log, and for whoever waits for `mesh up`.
    Told(Event),
}

/// Where the node stands, in one word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    Stopped,
    /// No netmap yet.
    Connecting,
    Running,
    Expired,
}

#[derive(Debug)]
pub struct State {
    session: Session,
    key: NodeKey,
    listen_port: u16,
    prefs: Prefs,
    /// The coordinator's clock, and when it was that late.
    clock: Option<(UnixTime, Instant)>,
    endpoints: BTreeSet<SocketAddr>,
    underlay: BTreeSet<LocalPrefix>,
    /// What the newest plan was made from.
    planned_from: Option<(Arc<Netmap>, Access)>,
    desired: Option<Arc<Desired>>,
    revision: u64,
    reports: BTreeMap<Actuator, (u64, Result<(), String>)>,
    /// Since when there is no session, and why.
    disconnected: Option<(Instant, String)>,
    refused: u64,
    health: Health,
    outputs: VecDeque<Output>,
}

impl State {
    /// Takes up what the disk remembers. `listen_port` is WireGuard's; `seed` spreads the waits of
    /// many nodes.
    pub fn new(keys: Keys, listen_port: u16, memory: Memory, seed: u64, now: Instant) -> Self {
        let Memory {
            prefs,
            membership,
            chain,
            clock,
        } = memory;
        let mut state = Self {
            key: keys.node.clone(),
            listen_port,
            session: Session::new(keys, membership, chain, seed),
            prefs,
            clock: clock.map(|clock| (clock, now)),
            endpoints: BTreeSet::new(),
            underlay: BTreeSet::new(),
            planned_from: None,
            desired: None,
            revision: 0,
            reports: BTreeMap::new(),
            disconnected: None,
            refused: 0,
            health: Health::default(),
            outputs: VecDeque::new(),
        };
        if state.prefs.up {
            state.disconnected = Some((now, "not connected yet".to_owned()));
            state.session.handle_up(None, now);
        }
        state.settle(now);
        if state.desired.is_none() {
            // Said all the same: an agent that was told to leave may have died before its device went.
            state.outputs.push_back(Output::Desired(None));
        }
        state
    }

    // === in ===

    /// `mesh up`. With `enroll`, becomes a node first where this machine is none.
    pub fn handle_up(&mut self, prefs: Prefs, enroll: Option<Enroll>, now: Instant) {
        if prefs.join != self.prefs.join {
            // Another place to connect to: the channel there is, is not the one wanted.
            self.session.handle_down(false);
        }
        self.prefs = Prefs { up: true, ..prefs };
        self.outputs.push_back(Output::Remember);
        self.health.clear("NodeDeleted");
        self.session.handle_up(enroll, now);
        if !self.session.is_connected() {
            self.disconnected
                .get_or_insert_with(|| (now, "not connected yet".to_owned()));
        }
        self.report();
        self.settle(now);
    }

    /// `mesh down`; with `logout` the node leaves the mesh for good.
    pub fn handle_down(&mut self, logout: bool, now: Instant) {
        self.prefs.up = false;
        self.session.handle_down(logout);
        self.disconnected = None;
        if logout {
            self.clock = None;
            self.prefs = Prefs::default();
        }
        self.outputs.push_back(Output::Remember);
        self.settle(now);
    }

    /// The coordinator behind the pin showed its whole key.
    pub fn handle_coordinator_key(&mut self, key: MachinePublic) {
        if self.prefs.coordinator != Some(key) {
            self.prefs.coordinator = Some(key);
            self.outputs.push_back(Output::Remember);
        }
    }

    pub fn handle_hello(&mut self, hello: Hello, now: Instant) {
        self.session.handle_hello(hello, now);
        self.settle(now);
    }

    pub fn handle_enrolled(&mut self, membership: Membership, now: Instant) {
        self.session.handle_enrolled(membership, now);
        self.settle(now);
    }

    /// See [`Session::handle_update`].
    pub fn handle_update(
        &mut self,
        accept: impl FnOnce(Option<&Netmap>) -> Result<Accepted, Refused>,
        now: Instant,
    ) {
        self.session.handle_update(accept, now);
        self.settle(now);
    }

    pub fn handle_notice(&mut self, notice: Notice, now: Instant) {
        self.session.handle_notice(notice, now);
        self.settle(now);
    }

    pub fn handle_failure(&mut self, failure: Failure, now: Instant) {
        self.session.handle_failure(failure, now);
        self.settle(now);
    }

    /// The underlay changed: where this node may be reached, and the prefixes of its interfaces.
    pub fn handle_underlay(
        &mut self,
        endpoints: BTreeSet<SocketAddr>,
        underlay: BTreeSet<LocalPrefix>,
        now: Instant,
    ) {
        if self.underlay != underlay {
            self.underlay = underlay;
            self.planned_from = None;
        }
        self.endpoints = endpoints;
        self.report();
        self.settle(now);
    }

    /// An actuator brought its resource to the plan of `revision`, or failed to.
    pub fn handle_actuator(
        &mut self,
        actuator: Actuator,
        revision: u64,
        result: Result<(), String>,
        now: Instant,
    ) {
        self.reports.insert(actuator, (revision, result));
        self.settle(now);
    }

    /// A shell raises or clears a condition of its own.
    pub fn handle_condition(&mut self, name: &'static str, condition: Option<Condition>) {
        self.health.set(name, condition);
    }

    pub fn handle_timeout(&mut self, now: Instant) {
        self.session.handle_timeout(now);
        self.settle(now);
    }

    // === out ===

    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.session.poll_transmit()
    }

    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<Instant> {
        let away = self.disconnected.as_ref().map(|(since, _)| *since);
        let told = self
            .health
            .iter()
            .any(|(name, _)| name == "CoordinatorUnreachable");
        let stale = self.health.iter().any(|(name, _)| name == "NetmapStale");
        [
            self.session.poll_timeout(),
            self.expiry(),
            away.filter(|_| !told)
                .map(|since| since + UNREACHABLE_AFTER),
            away.filter(|_| !stale && self.session.chain().is_some())
                .map(|since| since + STALE_AFTER),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    // === to look at ===

    pub fn memory(&self, now: Instant) -> Memory {
        Memory {
            prefs: self.prefs.clone(),
            membership: self.session.membership(),
            chain: self.session.chain().cloned(),
            clock: self.clock_at(now),
        }
    }

    pub fn prefs(&self) -> &Prefs {
        &self.prefs
    }

    pub fn netmap(&self) -> Option<&Arc<Netmap>> {
        self.session.chain().map(Chain::netmap)
    }

    pub fn desired(&self) -> Option<&Arc<Desired>> {
        self.desired.as_ref()
    }

    pub fn health(&self) -> &Health {
        &self.health
    }

    /// Why there is no session, where one is wanted.
    pub fn disconnected(&self) -> Option<&str> {
        let (_, reason) = self.disconnected.as_ref()?;
        Some(reason)
    }

    pub fn is_connected(&self) -> bool {
        self.session.is_connected()
    }

    /// Updates that were not taken since the start.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    pub fn standing(&self, now: Instant) -> Standing {
        match (self.prefs.up, self.netmap()) {
            (false, _) => Standing::Stopped,
            (true, None) if self.session.is_off() => Standing::Stopped,
            (true, None) => Standing::Connecting,
            (true, Some(netmap)) => match self.access(netmap, now) {
                Access::Granted => Standing::Running,
                Access::Expired => Standing::Expired,
            },
        }
    }

    /// The newest position that every enforcing actuator has applied.
    pub fn applied(&self) -> Option<(Epoch, Generation)> {
        let desired = self.desired.as_ref()?;
        let done = |actuator: Actuator| matches!(self.reports.get(&actuator), Some((revision, Ok(()))) if *revision == desired.revision);
        let all = Actuator::ALL.into_iter().filter(|a| a.enforces()).all(done);
        all.then_some((desired.epoch, desired.generation))
    }

    // === within ===

    fn report(&mut self) {
        self.session.handle_report(Report {
            endpoints: self.endpoints.clone(),
            advertised_routes: self.prefs.advertised_routes.clone(),
        });
    }

    /// Brings everything that follows from the inputs up to date.
    fn settle(&mut self, now: Instant) {
        while let Some(event) = self.session.poll_event() {
            self.hear(&event, now);
            self.outputs.push_back(Output::Told(event));
        }
        self.replan(now);
        self.acknowledge();
        self.examine(now);
    }

    fn hear(&mut self, event: &Event, now: Instant) {
        match event {
            Event::Clock(clock) => {
                self.clock = Some((*clock, now));
                self.outputs.push_back(Output::Remember);
            }
            Event::Connected => self.disconnected = None,
            Event::Disconnected(failure) => {
                let since = self.disconnected.take().map_or(now, |(since, _)| since);
                self.disconnected = Some((since, failure.text().to_owned()));
            }
            Event::Enrolled(_) | Event::Netmap(_) => {
                self.health.clear("NodeDeleted");
                self.health.clear("DuplicateNode");
                self.outputs.push_back(Output::Remember);
            }
            Event::Refused(_) => self.refused = self.refused.saturating_add(1),
            Event::Deleted(text) => {
                self.disconnected = None;
                self.health.raise("NodeDeleted", conditions::deleted(text));
                self.outputs.push_back(Output::Remember);
            }
            Event::Replaced(text) => {
                self.health
                    .raise("DuplicateNode", conditions::replaced(text));
            }
        }
    }

    fn replan(&mut self, now: Instant) {
        let netmap = self.netmap().filter(|_| self.prefs.up).cloned();
        let source = netmap.map(|netmap| {
            let access = self.access(&netmap, now);
            (netmap, access)
        });
        if source == self.planned_from {
            return;
        }
        self.planned_from = source;
        let local = Local {
            key: &self.key,
            listen_port: self.listen_port,
            underlay: &self.underlay,
        };
        let next = self
            .planned_from
            .as_ref()
            .map(|(netmap, access)| desired::plan(netmap, *access, &local, self.revision));
        if next.as_ref() == self.desired.as_deref() {
            return;
        }
        self.revision += 1;
        let revision = self.revision;
        self.desired = next.map(|next| Arc::new(Desired { revision, ..next }));
        self.outputs
            .push_back(Output::Desired(self.desired.clone()));
    }

    /// Tells the coordinator how far enforcement has come.
    fn acknowledge(&mut self) {
        let Some(desired) = self.desired.clone() else {
            return;
        };
        let error = Actuator::ALL
            .into_iter()
            .filter(|actuator| actuator.enforces())
            .find_map(|actuator| match self.reports.get(&actuator) {
                Some((revision, Err(error))) if *revision == desired.revision => {
                    Some(error.clone())
                }
                _ => None,
            });
        if error.is_some() || self.applied().is_some() {
            self.session.handle_applied(Applied {
                epoch: desired.epoch,
                generation: desired.generation,
                error,
            });
        }
    }

    fn access(&self, netmap: &Netmap, now: Instant) -> Access {
        let passed = netmap
            .me
            .expires
            .zip(self.clock_at(now))
            .is_some_and(|(expires, clock)| clock >= expires);
        if netmap.me.expired || passed {
            Access::Expired
        } else {
            Access::Granted
        }
    }

    /// The coordinator's clock now, carried on from the last time it was heard.
    fn clock_at(&self, now: Instant) -> Option<UnixTime> {
        let (clock, at) = self.clock?;
        let uptime = now.saturating_duration_since(at).as_secs();
        Some(UnixTime(clock.0.saturating_add(uptime)))
    }

    /// When the node key expires, if that is still to come.
    fn expiry(&self) -> Option<Instant> {
        let netmap = self.netmap().filter(|_| self.prefs.up)?;
        let (clock, at) = self.clock?;
        let left = netmap.me.expires?.0.checked_sub(clock.0)?;
        let expiry = at.checked_add(Duration::from_secs(left))?;
        // Once it has passed there is nothing to wake up for.
        let (_, access) = self.planned_from.as_ref()?;
        (*access == Access::Granted).then_some(expiry)
    }

    /// Raises and clears the conditions that follow from the state.
    fn examine(&mut self, now: Instant) {
        let away = self
            .disconnected
            .as_ref()
            .filter(|_| self.prefs.up)
            .map(|(since, reason)| (now.saturating_duration_since(*since), reason));
        let unreachable = away
            .filter(|(elapsed, _)| *elapsed >= UNREACHABLE_AFTER)
            .map(|(_, reason)| conditions::unreachable(reason));
        let stale = away
            .filter(|(elapsed, _)| *elapsed >= STALE_AFTER && self.netmap().is_some())
            .map(|_| conditions::stale());
        let expired = (self.standing(now) == Standing::Expired).then(conditions::expired);
        let overlap = self
            .netmap()
            .and_then(|netmap| routes::overlap(&self.underlay, &netmap.mesh.pools.each().into()));
        let failures = Actuator::ALL.map(|actuator| {
            let error = match self.reports.get(&actuator) {
                Some((_, Err(error))) if self.desired.is_some() => Some(error.as_str()),
                _ => None,
            };
            conditions::not_applied(actuator, error)
        });
        self.health.set("CoordinatorUnreachable", unreachable);
        self.health.set("NetmapStale", stale);
        self.health.set("NodeKeyExpired", expired);
        self.health.set(routes::POOL_OVERLAP, overlap);
        for (name, condition) in failures {
            self.health.set(name, condition);
        }
        let refused = (self.refused > 0).then(|| conditions::refused(self.refused));
        self.health.set("UpdateRefused", refused);
    }
}
