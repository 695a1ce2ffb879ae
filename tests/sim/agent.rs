//! One simulated agent: the product's state, a disk that keeps what it is told, and actuators that
//! take their time.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::agent::{Actuator, Memory, Output, Prefs, State};
use mesh_core::control::{Keys, Transmit};
use mesh_core::desired::Desired;
use mesh_core::key::{MachineKey, NodeKey};
use mesh_core::node::{Epoch, Generation};

/// From a plan to its application.
const APPLY: Duration = Duration::from_millis(30);

#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) keys: Keys,
    pub(crate) tag: usize,
    pub(crate) state: State,
    /// Number of the channel in use; what comes from another is not delivered.
    pub(crate) channel: u64,
    disk: Memory,
    applying: VecDeque<(Instant, Option<Arc<Desired>>)>,
    /// What the kernel would hold.
    pub(crate) kernel: Option<Arc<Desired>>,
    /// The highest position ever held; it may never sink.
    highest: (Epoch, Generation),
}

fn prefs() -> Prefs {
    Prefs {
        up: true,
        join: "mesh://sim".to_owned(),
        ..Prefs::default()
    }
}

impl Agent {
    pub(crate) fn new(number: usize, tag: usize, now: Instant) -> Self {
        let seed = |kind: u8| {
            let mut seed = [kind; 32];
            seed[..8].copy_from_slice(&(number as u64).to_be_bytes());
            seed
        };
        let keys = Keys {
            machine: MachineKey::from_seed(seed(1)),
            node: NodeKey::from_seed(seed(2)),
        };
        let disk = Memory::default();
        Self {
            state: State::new(keys.clone(), 41_641, disk.clone(), number as u64, now),
            keys,
            tag,
            channel: 0,
            disk,
            applying: VecDeque::new(),
            kernel: None,
            highest: (Epoch(0), Generation(0)),
        }
    }

    pub(crate) fn up(&mut self, enroll: Option<mesh_core::control::Enroll>, now: Instant) {
        self.state.handle_up(prefs(), enroll, now);
    }

    /// `kill -9` and a start from what the disk holds. The kernel keeps what it had.
    pub(crate) fn restart(&mut self, now: Instant) {
        self.channel += 1;
        self.applying.clear();
        let seed = self.channel;
        self.state = State::new(self.keys.clone(), 41_641, self.disk.clone(), seed, now);
    }

    /// Steps for the network, after outputs and actuators have had their turn.
    pub(crate) fn turn(&mut self, now: Instant) -> Vec<Transmit> {
        self.state.handle_timeout(now);
        while let Some((at, _)) = self.applying.front()
            && *at <= now
        {
            let (_, plan) = self.applying.pop_front().unwrap();
            self.kernel.clone_from(&plan);
            if let Some(plan) = plan {
                for actuator in Actuator::ALL {
                    self.state
                        .handle_actuator(actuator, plan.revision, Ok(()), now);
                }
            }
        }
        while let Some(output) = self.state.poll_output() {
            match output {
                Output::Desired(plan) => self.applying.push_back((now + APPLY, plan)),
                Output::Remember => self.disk = self.state.memory(now),
                Output::Told(_) => {}
            }
        }
        if let Some(netmap) = self.state.netmap() {
            let position = (netmap.epoch, netmap.generation);
            assert!(
                position >= self.highest,
                "fell from {:?} to {position:?}",
                self.highest
            );
            self.highest = position;
        }
        std::iter::from_fn(|| self.state.poll_transmit()).collect()
    }

    pub(crate) fn next_wake(&self) -> Option<Instant> {
        let applied = self.applying.front().map(|(at, _)| *at);
        [applied, self.state.poll_timeout()]
            .into_iter()
            .flatten()
            .min()
    }
}
