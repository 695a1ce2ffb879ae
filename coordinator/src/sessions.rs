//! Who is connected, and how far each node has come in enforcing what it was told.
//!
//! Nothing here is stored but the time of a node's last goodbye, and that only now and then: a
//! thousand nodes that reconnect after a restart must not cost a thousand writes. The lock is held
//! for a few map operations and never across a wait.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_core::node::{Epoch, Generation, NodeId, UnixTime};
use tokio::sync::oneshot;

use crate::clock::Clock;

/// Why a session ends from our side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// A newer session of the same machine key took over.
    Replaced,
}

/// What is known of one node's session, past or present.
#[derive(Debug, Clone, Default)]
pub struct View {
    pub connected: bool,
    pub last_seen: Option<UnixTime>,
    /// The generation that the node is known to enforce.
    pub applied: Option<Generation>,
    /// What the node said went wrong; empty: nothing.
    pub apply_error: String,
}

#[derive(Debug, Clone)]
pub struct Sessions {
    inner: Arc<Mutex<Inner>>,
    clock: Clock,
}

#[derive(Debug, Default)]
struct Inner {
    serial: u64,
    live: BTreeMap<NodeId, Live>,
    last_seen: BTreeMap<NodeId, UnixTime>,
    /// Goodbyes that are not stored yet.
    unsaved: BTreeMap<NodeId, UnixTime>,
    /// A node holds a map newer than this world: somebody put an old database back by hand.
    ahead: Option<(NodeId, Generation)>,
}

#[derive(Debug)]
struct Live {
    serial: u64,
    end: Option<oneshot::Sender<End>>,
    /// Generation of the last update that was sent, and of the last world that was looked at.
    sent: Generation,
    through: Generation,
    applied: Option<Generation>,
    apply_error: String,
}

impl Sessions {
    pub fn new(last_seen: BTreeMap<NodeId, UnixTime>, clock: Clock) -> Self {
        let inner = Inner {
            last_seen,
            ..Inner::default()
        };
        Self {
            inner: Arc::new(Mutex::new(inner)),
            clock,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // The map is sound after any panic: every change is a single operation.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the node's one place; whoever sat there is told to leave.
    pub fn begin(&self, node: NodeId) -> (Seat, oneshot::Receiver<End>) {
        let (end, ended) = oneshot::channel();
        let mut inner = self.lock();
        inner.serial += 1;
        let serial = inner.serial;
        let live = Live {
            serial,
            end: Some(end),
            sent: Generation(0),
            through: Generation(0),
            applied: None,
            apply_error: String::new(),
        };
        if let Some(mut old) = inner.live.insert(node, live)
            && let Some(end) = old.end.take()
        {
            let _ = end.send(End::Replaced);
        }
        let seat = Seat {
            sessions: self.clone(),
            node,
            serial,
        };
        (seat, ended)
    }

    pub fn view(&self, node: NodeId) -> View {
        let inner = self.lock();
        let last_seen = inner.last_seen.get(&node).copied();
        match inner.live.get(&node) {
            None => View {
                last_seen,
                ..View::default()
            },
            Some(live) => View {
                connected: true,
                last_seen: Some(self.clock.now()),
                // All that was sent is enforced: so is every world that changed nothing for it.
                applied: live.applied.map(|applied| {
                    if applied >= live.sent {
                        live.through.max(applied)
                    } else {
                        applied
                    }
                }),
                apply_error: live.apply_error.clone(),
            },
        }
    }

    pub fn connected(&self) -> usize {
        self.lock().live.len()
    }

    /// When the node was last connected, if it is not now. `started`: for who never was.
    pub fn gone_since(&self, node: NodeId, started: UnixTime) -> Option<UnixTime> {
        let inner = self.lock();
        if inner.live.contains_key(&node) {
            return None;
        }
        let seen = inner.last_seen.get(&node).copied();
        // A node may have been connected until this process started: it gets its time to return.
        Some(seen.map_or(started, |seen| seen.max(started)))
    }

    /// Goodbyes since the last call, and now for all who are connected.
    pub fn take_unsaved(&self) -> Vec<(NodeId, UnixTime)> {
        let now = self.clock.now();
        let mut inner = self.lock();
        let mut unsaved = std::mem::take(&mut inner.unsaved);
        unsaved.extend(inner.live.keys().map(|node| (*node, now)));
        unsaved.into_iter().collect()
    }

    pub fn note_ahead(&self, node: NodeId, generation: Generation) {
        self.lock().ahead = Some((node, generation));
    }

    pub fn ahead(&self) -> Option<(NodeId, Generation)> {
        self.lock().ahead
    }
}

/// A session's place among the connected; leaving it is noticed by itself.
#[derive(Debug)]
pub struct Seat {
    sessions: Sessions,
    node: NodeId,
    serial: u64,
}

impl Seat {
    fn with(&self, change: impl FnOnce(&mut Live)) {
        let mut inner = self.sessions.lock();
        if let Some(live) = inner.live.get_mut(&self.node)
            && live.serial == self.serial
        {
            change(live);
        }
    }

    /// The world of this generation was looked at; `sent`: it took an update.
    pub fn looked_at(&self, generation: Generation, sent: bool) {
        self.with(|live| {
            live.through = generation;
            if sent {
                live.sent = generation;
            }
        });
    }

    /// The node says what it enforces.
    pub fn applied(&self, ours: Epoch, epoch: Epoch, generation: Generation, error: String) {
        self.with(|live| {
            if epoch == ours && error.is_empty() {
                live.applied = live.applied.max(Some(generation));
            }
            live.apply_error = error;
        });
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let now = self.sessions.clock.now();
        let mut inner = self.sessions.lock();
        if inner
            .live
            .get(&self.node)
            .is_some_and(|live| live.serial == self.serial)
        {
            inner.live.remove(&self.node);
        }
        inner.last_seen.insert(self.node, now);
        inner.unsaved.insert(self.node, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sessions() -> Sessions {
        Sessions::new(BTreeMap::new(), Clock::start())
    }

    #[test]
    fn a_second_session_replaces_the_first_and_outlives_it() {
        let sessions = sessions();
        let (first, mut first_ended) = sessions.begin(NodeId(1));
        let (second, mut second_ended) = sessions.begin(NodeId(1));
        assert_eq!(first_ended.try_recv(), Ok(End::Replaced));
        drop(first);
        assert!(second_ended.try_recv().is_err());
        assert!(sessions.view(NodeId(1)).connected);
        drop(second);
        assert!(!sessions.view(NodeId(1)).connected);
        assert!(sessions.view(NodeId(1)).last_seen.is_some());
    }

    #[test]
    fn a_node_has_come_as_far_as_the_last_world_that_changed_nothing_for_it() {
        let sessions = sessions();
        let (seat, _ended) = sessions.begin(NodeId(1));
        let applied = || sessions.view(NodeId(1)).applied;
        seat.looked_at(Generation(5), true);
        assert_eq!(applied(), None);
        seat.applied(Epoch(1), Epoch(1), Generation(5), String::new());
        assert_eq!(applied(), Some(Generation(5)));
        seat.looked_at(Generation(9), false);
        assert_eq!(applied(), Some(Generation(9)));
        seat.looked_at(Generation(10), true);
        assert_eq!(applied(), Some(Generation(5)));
        seat.applied(Epoch(1), Epoch(0), Generation(99), String::new());
        assert_eq!(applied(), Some(Generation(5)));
        seat.applied(Epoch(1), Epoch(1), Generation(10), "no".to_owned());
        assert_eq!(applied(), Some(Generation(5)));
        assert_eq!(sessions.view(NodeId(1)).apply_error, "no");
    }
}
