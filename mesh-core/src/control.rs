//! The control session: a node's side of its talk with the coordinator, as a machine.
//!
//! connect → hello → enroll, if this machine is no node yet → begin → updates down, reports up. The
//! machine never waits for an answer: whatever arrives is a `handle_…`, whatever is to be done is
//! polled. A shell that loses the channel says so once, and the machine decides when to try again.
//!
//! Nothing that goes wrong here takes the held netmap away, but the coordinator's own word that the
//! node was deleted: fail static.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::backoff::Backoff;
use crate::key::{NodeProof, ProofContext};
use crate::netmap::Netmap;

mod chain;
#[cfg(test)]
mod tests;
mod words;

pub use chain::{Accepted, Chain, Kind, Refused};
pub use words::{
    Applied, Enroll, Event, Failure, Hello, Keys, Membership, Notice, Report, Transmit,
};

/// How long one step of connecting may take before it counts as failed.
const STEP_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a session must live for the next failure to be retried at once.
const GOOD_SESSION: Duration = Duration::from_secs(10);
/// How long an update is left alone before a full map is asked for because of it: it must be applied first, and
/// a full map is as much work.
const SHORTEN_AFTER: Duration = Duration::from_secs(10);
/// Wait after another machine took over the session with this very machine key: two clones that
/// reconnect at once would evict each other for ever.
const REPLACED_WAIT: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
enum Phase {
    /// Nothing is wanted, or nothing can be done before the user acts.
    Off,
    Waiting {
        until: Instant,
    },
    Connecting {
        deadline: Instant,
    },
    Enrolling {
        deadline: Instant,
        hello: Hello,
    },
    Streaming {
        since: Instant,
        /// When a full map is asked for.
        shorten: Option<Instant>,
    },
}

#[derive(Debug)]
pub struct Session {
    keys: Keys,
    phase: Phase,
    backoff: Backoff,
    membership: Option<Membership>,
    enroll: Option<Enroll>,
    chain: Option<Chain>,
    /// The next session starts from a full map.
    full_wanted: bool,
    report: Report,
    applied: Option<Applied>,
    transmits: VecDeque<Transmit>,
    events: VecDeque<Event>,
}

impl Session {
    /// `seed` spreads the waits of many nodes. `membership` and `chain` are what the disk remembers.
    pub fn new(
        keys: Keys,
        membership: Option<Membership>,
        chain: Option<Chain>,
        seed: u64,
    ) -> Self {
        Self {
            keys,
            phase: Phase::Off,
            backoff: Backoff::new(seed),
            membership,
            enroll: None,
            chain,
            full_wanted: false,
            report: Report::default(),
            applied: None,
            transmits: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    pub fn membership(&self) -> Option<Membership> {
        self.membership
    }

    pub fn chain(&self) -> Option<&Chain> {
        self.chain.as_ref()
    }

    /// Nothing is wanted, or nothing can be done before the user acts.
    pub fn is_off(&self) -> bool {
        matches!(self.phase, Phase::Off)
    }

    pub fn is_connected(&self) -> bool {
        matches!(self.phase, Phase::Streaming { .. })
    }

    // === in ===

    /// Connects, and stays connected until [`Session::handle_down`]. With `enroll`, becomes a node
    /// first where the machine is none, or where its key has expired.
    pub fn handle_up(&mut self, enroll: Option<Enroll>, now: Instant) {
        if enroll.is_some() {
            self.enroll = enroll;
        }
        self.backoff.reset();
        if !self.is_connected() || self.must_enroll_again() {
            self.connect(now);
        }
    }

    /// Leaves the channel; with `logout` leaves the mesh first, as far as the coordinator is reached.
    pub fn handle_down(&mut self, logout: bool) {
        if logout {
            if self.is_connected() {
                self.transmits.push_back(Transmit::Logout);
            }
            self.forget();
        }
        self.enroll = None;
        self.close();
    }

    pub fn handle_hello(&mut self, hello: Hello, now: Instant) {
        if !matches!(self.phase, Phase::Connecting { .. }) {
            return;
        }
        self.events.push_back(Event::Clock(hello.now));
        let known = match (hello.node, self.membership) {
            (Some(node), Some(membership)) if membership.node != node => {
                // The coordinator knows this machine as another node: what is held is not ours.
                self.forget();
                true
            }
            (Some(_), _) => true,
            (None, _) => false,
        };
        if known && !self.must_enroll_again() {
            self.begin(&hello, now);
        } else if let Some(enroll) = self.enroll.clone() {
            let proof = self.prove(&hello);
            self.transmits.push_back(Transmit::Enroll { enroll, proof });
            self.phase = Phase::Enrolling {
                deadline: now + STEP_TIMEOUT,
                hello,
            };
        } else if self.membership.is_some() {
            self.deleted("the coordinator does not know this machine any more".to_owned());
        } else {
            self.close();
            self.events.push_back(Event::Disconnected(Failure::Denied(
                "this machine is not a node yet: a pre-auth key is needed".to_owned(),
            )));
        }
    }

    pub fn handle_enrolled(&mut self, membership: Membership, now: Instant) {
        let Phase::Enrolling { hello, .. } = self.phase else {
            return;
        };
        self.enroll = None;
        if self.membership != Some(membership) {
            self.forget();
            self.membership = Some(membership);
        }
        self.full_wanted = true;
        self.events.push_back(Event::Enrolled(membership));
        self.begin(&hello, now);
    }

    /// A signed update arrived; `accept` verifies it against the map held and parses it.
    pub fn handle_update(
        &mut self,
        accept: impl FnOnce(Option<&Netmap>) -> Result<Accepted, Refused>,
        now: Instant,
    ) {
        if !self.is_connected() {
            return;
        }
        let held = self.chain.as_ref();
        let next = accept(held.map(|chain| &**chain.netmap()))
            .and_then(|accepted| self.check_membership(accepted))
            .and_then(|accepted| Chain::after(held, accepted));
        match next {
            Ok(chain) => {
                let long = chain.is_long();
                self.membership = Some(Membership {
                    mesh: chain.netmap().mesh.id,
                    node: chain.netmap().me.id,
                });
                if !chain.netmap().me.expired {
                    // Enrolled and valid: a key left over must not be used at some later time.
                    self.enroll = None;
                }
                self.chain = Some(chain.clone());
                self.events.push_back(Event::Netmap(chain));
                if self.must_enroll_again() {
                    self.start_anew(now);
                } else if let Phase::Streaming { shorten, .. } = &mut self.phase {
                    *shorten = long.then(|| shorten.unwrap_or(now + SHORTEN_AFTER));
                }
            }
            Err(refused) => {
                let gap = refused == Refused::Gap;
                self.events.push_back(Event::Refused(refused));
                if gap {
                    self.full_wanted = true;
                    self.retry(now);
                }
            }
        }
    }

    pub fn handle_notice(&mut self, notice: Notice, now: Instant) {
        if !self.is_connected() {
            return;
        }
        match notice {
            Notice::Deleted(text) => self.deleted(text),
            Notice::Replaced(text) => {
                self.events.push_back(Event::Replaced(text));
                self.wait(REPLACED_WAIT, now);
            }
            Notice::Shutdown { retry_after } => self.wait(retry_after.min(REPLACED_WAIT), now),
        }
    }

    /// The channel is gone, or a step on it failed. Idempotent.
    pub fn handle_failure(&mut self, failure: Failure, now: Instant) {
        let since = match self.phase {
            Phase::Off | Phase::Waiting { .. } => return,
            Phase::Connecting { .. } | Phase::Enrolling { .. } => None,
            Phase::Streaming { since, .. } => Some(since),
        };
        let enrolling = matches!(self.phase, Phase::Enrolling { .. });
        if since.is_some_and(|since| now >= since + GOOD_SESSION) {
            self.backoff.reset();
        }
        if enrolling && matches!(failure, Failure::Denied(_)) {
            // A refused key is refused again; the user must bring another.
            self.enroll = None;
            if self.membership.is_none() {
                self.close();
            } else {
                self.retry(now);
            }
        } else {
            self.retry(now);
        }
        self.events.push_back(Event::Disconnected(failure));
    }

    /// Replaces the report before; sent at once, and again with every new session.
    pub fn handle_report(&mut self, report: Report) {
        if self.report == report {
            return;
        }
        self.report = report;
        if self.is_connected() {
            self.transmits
                .push_back(Transmit::Report(self.report.clone()));
        }
    }

    pub fn handle_applied(&mut self, applied: Applied) {
        if self.applied.as_ref() == Some(&applied) {
            return;
        }
        self.applied = Some(applied.clone());
        if self.is_connected() {
            self.transmits.push_back(Transmit::Applied(applied));
        }
    }

    pub fn handle_timeout(&mut self, now: Instant) {
        match self.phase {
            Phase::Waiting { until } if now >= until => self.connect(now),
            Phase::Connecting { deadline } | Phase::Enrolling { deadline, .. }
                if now >= deadline =>
            {
                let text = "the coordinator did not answer in time".to_owned();
                self.handle_failure(Failure::Unreachable(text), now);
            }
            Phase::Streaming {
                shorten: Some(at), ..
            } if now >= at => self.start_anew(now),
            Phase::Off
            | Phase::Waiting { .. }
            | Phase::Connecting { .. }
            | Phase::Enrolling { .. }
            | Phase::Streaming { .. } => {}
        }
    }

    // === out ===

    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<Instant> {
        match self.phase {
            Phase::Off => None,
            Phase::Streaming { shorten, .. } => shorten,
            Phase::Waiting { until: at }
            | Phase::Connecting { deadline: at }
            | Phase::Enrolling { deadline: at, .. } => Some(at),
        }
    }

    // === within ===

    /// A key was given and the node's own has expired.
    fn must_enroll_again(&self) -> bool {
        let expired = |chain: &Chain| chain.netmap().me.expired;
        self.enroll.is_some() && self.chain.as_ref().is_some_and(expired)
    }

    fn check_membership(&self, accepted: Accepted) -> Result<Accepted, Refused> {
        let got = Membership {
            mesh: accepted.netmap.mesh.id,
            node: accepted.netmap.me.id,
        };
        if self.membership.is_none_or(|have| have == got) {
            Ok(accepted)
        } else {
            let text = "the update is for another node or mesh".to_owned();
            Err(Refused::Untrusted(text))
        }
    }

    fn prove(&self, hello: &Hello) -> NodeProof {
        let context = ProofContext {
            exporter: &hello.exporter,
            machine: &self.keys.machine.public(),
            node: &self.keys.node.public(),
        };
        self.keys.node.prove(&hello.challenge, &context)
    }

    fn connect(&mut self, now: Instant) {
        if !matches!(self.phase, Phase::Off | Phase::Waiting { .. }) {
            self.close();
        }
        self.transmits.push_back(Transmit::Connect);
        self.phase = Phase::Connecting {
            deadline: now + STEP_TIMEOUT,
        };
    }

    fn begin(&mut self, hello: &Hello, now: Instant) {
        let held = match std::mem::take(&mut self.full_wanted) {
            true => None,
            false => self.chain.as_ref().map(|chain| chain.netmap().clone()),
        };
        let proof = self.prove(hello);
        self.transmits.push_back(Transmit::Begin { proof, held });
        self.transmits
            .push_back(Transmit::Report(self.report.clone()));
        if let Some(applied) = self.applied.clone() {
            self.transmits.push_back(Transmit::Applied(applied));
        }
        self.phase = Phase::Streaming {
            since: now,
            shorten: None,
        };
        self.events.push_back(Event::Connected);
    }

    fn deleted(&mut self, text: String) {
        self.forget();
        self.close();
        self.events.push_back(Event::Deleted(text));
    }

    fn forget(&mut self) {
        self.membership = None;
        self.chain = None;
        self.applied = None;
        self.full_wanted = false;
    }

    fn close(&mut self) {
        if !matches!(self.phase, Phase::Off | Phase::Waiting { .. }) {
            self.transmits.push_back(Transmit::Close);
        }
        self.phase = Phase::Off;
    }

    fn retry(&mut self, now: Instant) {
        let wait = self.backoff.next_wait();
        self.close();
        self.phase = Phase::Waiting { until: now + wait };
    }

    fn wait(&mut self, wait: Duration, now: Instant) {
        let wait = self.backoff.jitter(wait);
        self.close();
        self.phase = Phase::Waiting { until: now + wait };
        let text = "the coordinator ended the session".to_owned();
        self.events
            .push_back(Event::Disconnected(Failure::Unreachable(text)));
    }

    /// From a full map.
    fn start_anew(&mut self, now: Instant) {
        self.full_wanted = true;
        self.close();
        self.connect(now);
    }
}
