//! The simulated mesh: agents, coordinator, the queue between them, and the clock.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_agent::control::accept;
use mesh_api::v1;
use mesh_core::agent::Standing;
use mesh_core::control::{Enroll, Failure, Hello, Membership, Notice, Transmit};
use mesh_core::key::{NodeKey, ProofContext};
use mesh_core::netmap::build;
use mesh_core::node::{NodeId, UnixTime};

use crate::agent::Agent;
use crate::coordinator::Coordinator;
use crate::model::{Model, Pairs};

/// One way through the underlay.
const LATENCY: Duration = Duration::from_millis(10);
/// Virtual time in which a healed mesh must come to rest.
const REST: Duration = Duration::from_secs(300);

/// What a faulty network does to the next updates. TCP does none of this; the machine must not
/// care.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    Lose,
    Repeat,
    Delay,
}

#[derive(Clone, Debug)]
enum Message {
    Hello(Hello),
    Enrolled(Membership),
    Update(v1::SignedUpdate),
    Notice(Notice),
    Failed(Failure),
}

#[derive(Debug)]
pub(crate) struct Simulation {
    pub(crate) now: Instant,
    start: Instant,
    pub(crate) agents: Vec<Agent>,
    pub(crate) coordinator: Coordinator,
    pub(crate) reachable: bool,
    backup: Coordinator,
    faults: Vec<Fault>,
    /// By time and order of sending: to which agent, over which channel.
    queue: BTreeMap<(Instant, u64), (usize, u64, Message)>,
    sent: u64,
    /// Updates seen on the wire, to be played again by somebody hostile.
    recorded: Vec<(usize, v1::SignedUpdate)>,
}

impl Simulation {
    pub(crate) fn new(pairs: Pairs) -> Self {
        let now = Instant::now();
        let coordinator = Coordinator::new(pairs);
        Self {
            now,
            start: now,
            agents: Vec::new(),
            backup: coordinator.clone(),
            coordinator,
            reachable: true,
            faults: Vec::new(),
            queue: BTreeMap::new(),
            sent: 0,
            recorded: Vec::new(),
        }
    }

    // === what a test does ===

    pub(crate) fn add_agent(&mut self, tag: usize) -> usize {
        let number = self.agents.len();
        self.agents.push(Agent::new(number, tag, self.now));
        self.enroll(number);
        number
    }

    /// `mesh up` with a fresh pre-auth key.
    pub(crate) fn enroll(&mut self, agent: usize) {
        let enroll = Enroll {
            auth_key: "fresh".to_owned(),
            name: String::new(),
        };
        let now = self.now;
        self.agents[agent].up(Some(enroll), now);
    }

    pub(crate) fn restart(&mut self, agent: usize) {
        let now = self.now;
        self.hang_up(agent);
        self.agents[agent].restart(now);
    }

    /// The channel breaks.
    pub(crate) fn cut(&mut self, agent: usize) {
        self.hang_up(agent);
        let failure = Failure::Unreachable("cut".to_owned());
        let now = self.now;
        self.agents[agent].state.handle_failure(failure, now);
    }

    /// The machine has another address.
    pub(crate) fn roam(&mut self, agent: usize, host: u8) {
        let endpoint = SocketAddr::from(([192, 0, 2, host], 41_641));
        let now = self.now;
        self.agents[agent]
            .state
            .handle_underlay([endpoint].into(), BTreeSet::new(), now);
    }

    pub(crate) fn fault(&mut self, fault: Fault) {
        self.faults.push(fault);
    }

    /// The coordinator goes away, or comes back with what it had.
    pub(crate) fn set_reachable(&mut self, reachable: bool) {
        self.reachable = reachable;
        if !reachable {
            for agent in 0..self.agents.len() {
                self.cut(agent);
            }
        }
    }

    pub(crate) fn back_up(&mut self) {
        self.backup = self.coordinator.clone();
    }

    pub(crate) fn restore(&mut self) {
        for agent in 0..self.agents.len() {
            self.cut(agent);
        }
        let backup = self.backup.clone();
        self.coordinator.restore(&backup);
    }

    pub(crate) fn delete(&mut self, agent: usize) {
        let Some(id) = self.node(agent) else { return };
        if self.coordinator.delete(id) && self.reachable {
            let notice = Notice::Deleted("by an admin".to_owned());
            self.send(agent, Message::Notice(notice));
        }
    }

    /// Somebody who records updates plays an old one into a node's channel.
    pub(crate) fn replay(&mut self, which: usize) {
        if !self.recorded.is_empty() {
            let (agent, update) = self.recorded[which % self.recorded.len()].clone();
            self.send(agent, Message::Update(update));
        }
    }

    /// Somebody signs the agent's newest map with a key of his own.
    pub(crate) fn forge(&mut self, agent: usize) {
        if let Some(netmap) = self.agents[agent].state.netmap() {
            let mut forged = (**netmap).clone();
            forged.generation.0 += 1_000;
            forged.peers.clear();
            let mallory = mesh_core::key::MachineKey::from_seed([66; 32]);
            let update = mesh_api::update::sign_full(&mallory, &forged);
            self.send(agent, Message::Update(update));
        }
    }

    pub(crate) fn node(&self, agent: usize) -> Option<NodeId> {
        let machine = self.agents[agent].keys.machine.public();
        self.coordinator.node_of(&machine)
    }

    // === time ===

    /// Runs for `span` of virtual time.
    pub(crate) fn run(&mut self, span: Duration) {
        let end = self.now + span;
        loop {
            self.turn();
            let wake = self.agents.iter().filter_map(Agent::next_wake).min();
            let arrival = self.queue.keys().next().map(|(at, _)| *at);
            let next = wake.into_iter().chain(arrival).min();
            match next {
                Some(at) if at <= end => self.now = self.now.max(at),
                _ => break,
            }
        }
        self.now = end;
        self.turn();
    }

    /// No more faults, one more reconnect for everybody, and time to settle.
    pub(crate) fn heal(&mut self) {
        self.faults.clear();
        self.reachable = true;
        for agent in 0..self.agents.len() {
            self.cut(agent);
            // A machine that was told that it is no node has stopped asking: a restored world may
            // know it again, and then somebody says `mesh up` there.
            if self.agents[agent].state.standing(self.now) == Standing::Stopped {
                let now = self.now;
                self.agents[agent].up(None, now);
            }
        }
        self.run(REST);
    }

    fn turn(&mut self) {
        // Deliveries and turns beget more of both, but each takes time: this ends.
        while let Some(entry) = self.queue.first_entry()
            && entry.key().0 <= self.now
        {
            let (agent, channel, message) = entry.remove();
            self.deliver(agent, channel, message);
        }
        for agent in 0..self.agents.len() {
            let now = self.now;
            for transmit in self.agents[agent].turn(now) {
                self.carry(agent, transmit);
            }
        }
        self.publish();
    }

    fn send(&mut self, agent: usize, message: Message) {
        let at = self.now + LATENCY;
        self.send_at(at, agent, message);
    }

    fn send_at(&mut self, at: Instant, agent: usize, message: Message) {
        let channel = self.agents[agent].channel;
        self.sent += 1;
        self.queue
            .insert((at, self.sent), (agent, channel, message));
    }

    fn publish(&mut self) {
        if !self.reachable {
            return;
        }
        for agent in 0..self.agents.len() {
            let Some(id) = self.node(agent) else { continue };
            let Some(update) = self.coordinator.update(id) else {
                continue;
            };
            self.recorded.push((agent, update.clone()));
            let late = self.now + LATENCY * 5;
            match self.faults.pop() {
                None => self.send(agent, Message::Update(update)),
                Some(Fault::Lose) => {}
                Some(Fault::Repeat) => {
                    self.send(agent, Message::Update(update.clone()));
                    self.send_at(late, agent, Message::Update(update));
                }
                Some(Fault::Delay) => self.send_at(late, agent, Message::Update(update)),
            }
        }
    }

    fn hang_up(&mut self, agent: usize) {
        self.agents[agent].channel += 1;
        if let Some(id) = self.node(agent) {
            self.coordinator.end(id);
        }
    }

    // === agent to coordinator ===

    fn carry(&mut self, agent: usize, transmit: Transmit) {
        let machine = self.agents[agent].keys.machine.public();
        let id = self.coordinator.node_of(&machine);
        match transmit {
            Transmit::Connect => {
                self.hang_up(agent);
                let answer = if self.reachable {
                    Message::Hello(self.hello(id))
                } else {
                    Message::Failed(Failure::Unreachable("nobody there".to_owned()))
                };
                self.send(agent, answer);
            }
            Transmit::Enroll { proof, .. } => {
                let keys = self.agents[agent].keys.clone();
                self.check(&keys, &proof);
                let membership = self.coordinator.enroll(&keys, self.agents[agent].tag);
                self.send(agent, Message::Enrolled(membership));
            }
            Transmit::Begin { proof, held } => {
                let keys = self.agents[agent].keys.clone();
                self.check(&keys, &proof);
                match id {
                    Some(id) => self.coordinator.begin(id, held.as_deref()),
                    None => self.send(agent, Message::Notice(Notice::Deleted(String::new()))),
                }
            }
            Transmit::Report(report) => {
                if let Some(id) = id {
                    self.coordinator.report(id, report.endpoints);
                }
            }
            Transmit::Applied(applied) => {
                if let Some(id) = id {
                    self.coordinator.applied.insert(id, applied);
                }
            }
            Transmit::Logout | Transmit::Close => self.hang_up(agent),
        }
    }

    fn hello(&self, node: Option<NodeId>) -> Hello {
        Hello {
            challenge: challenge().public(),
            exporter: [5; 32],
            now: UnixTime(1_000_000 + (self.now - self.start).as_secs()),
            node,
        }
    }

    fn check(&self, keys: &mesh_core::control::Keys, proof: &mesh_core::key::NodeProof) {
        let context = ProofContext {
            exporter: &[5; 32],
            machine: &keys.machine.public(),
            node: &keys.node.public(),
        };
        assert!(proof.verify(&challenge(), &context));
    }

    // === coordinator to agent ===

    fn deliver(&mut self, agent: usize, channel: u64, message: Message) {
        let now = self.now;
        let coordinator = self.coordinator.key.public();
        let agent = &mut self.agents[agent];
        if agent.channel != channel {
            return;
        }
        let state = &mut agent.state;
        match message {
            Message::Hello(hello) => state.handle_hello(hello, now),
            Message::Enrolled(membership) => state.handle_enrolled(membership, now),
            Message::Update(update) => {
                let membership = state.memory(now).membership;
                let verify = |held: Option<&_>| accept(&coordinator, membership, held, &update);
                state.handle_update(verify, now);
            }
            Message::Notice(notice) => state.handle_notice(notice, now),
            Message::Failed(failure) => state.handle_failure(failure, now),
        }
    }

    // === what must hold at rest ===

    /// Every node that is one holds exactly the map that the world means for it, has applied it and
    /// said so; and knows exactly whom the model says.
    pub(crate) fn check_at_rest(&self, model: &Model) {
        let numbers: BTreeMap<NodeId, usize> = (0..self.agents.len())
            .filter_map(|agent| Some((self.node(agent)?, agent)))
            .collect();
        for (number, agent) in self.agents.iter().enumerate() {
            let Some(id) = self.node(number) else {
                assert!(agent.state.netmap().is_none(), "node {number} is none");
                assert!(agent.kernel.is_none(), "node {number} left a device");
                continue;
            };
            let meant = build::build(&self.coordinator.world, &self.coordinator.policy, id);
            let held = agent.state.netmap().map(|netmap| (**netmap).clone());
            assert_eq!(held, meant, "node {number}");
            let netmap = held.expect("an enrolled node has a map");

            let known: BTreeSet<usize> = netmap.peers.keys().map(|id| numbers[id]).collect();
            let expected = model.peers(self.coordinator.pairs, number);
            assert_eq!(known, expected, "whom node {number} knows");
            let expired = model.expired.contains(&number);
            assert_eq!(netmap.me.expired, expired, "node {number}");

            let kernel = agent.kernel.as_ref().expect("a plan was applied");
            let keys: BTreeSet<_> = kernel.wireguard.peers.keys().copied().collect();
            let peers: BTreeSet<_> = netmap.peers.values().map(|peer| peer.key).collect();
            assert_eq!(keys, peers, "WireGuard's peers of node {number}");
            assert_eq!(kernel.netmap.policy, netmap.policy);

            let applied = &self.coordinator.applied[&id];
            assert_eq!(
                (applied.epoch, applied.generation, &applied.error),
                (netmap.epoch, netmap.generation, &None),
                "what node {number} said"
            );
        }
    }
}

fn challenge() -> NodeKey {
    NodeKey::from_seed([8; 32])
}
