//! The flow log's way out: to a file of JSON lines, and to whoever asks `mesh flows`.
//!
//! Nobody who reads slowly holds anybody up: what a reader was too slow for is a number in what it
//! reads next.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_core::Direction;
use mesh_core::flow::{Described, Query};
use tokio::sync::broadcast;

/// What a latecomer gets to see.
const REMEMBERED: usize = 4_096;
/// Entries that a reader may be behind.
const BEHIND: usize = 8_192;

/// One line.
#[derive(Clone, PartialEq, Debug)]
pub enum Entry {
    Flow(Box<Described>),
    /// So many events of a kind that nobody was told of.
    Lost {
        /// Since 1970.
        time: Duration,
        what: &'static str,
        count: u64,
    },
}

impl Entry {
    /// What was lost is for everybody.
    pub fn is_wanted(&self, query: &Query) -> bool {
        match self {
            Self::Flow(described) => query.matches(described),
            Self::Lost { .. } => true,
        }
    }

    fn time(&self) -> Duration {
        match self {
            Self::Flow(flow) => flow.time,
            Self::Lost { time, .. } => *time,
        }
    }

    /// The node at the far end, as far as it is known.
    fn node(&self) -> Option<String> {
        match self {
            Self::Flow(flow) => match flow.direction {
                Direction::Ingress => flow.source.node.clone(),
                Direction::Egress => flow.destination.node.clone(),
            },
            Self::Lost { .. } => None,
        }
    }
}

/// Where entries go, and come from. Cloned freely.
#[derive(Clone, Debug)]
pub struct FlowLog {
    recent: Arc<Mutex<Recent>>,
    news: broadcast::Sender<Arc<Entry>>,
}

impl Default for FlowLog {
    fn default() -> Self {
        Self {
            recent: Arc::default(),
            news: broadcast::channel(BEHIND).0,
        }
    }
}

impl FlowLog {
    pub(crate) fn tell(&self, entry: Entry) {
        let entry = Arc::new(entry);
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.push(entry.clone());
        // Under the lock, so that a follower misses none and gets none twice. Nobody may listen.
        let _ = self.news.send(entry);
    }

    /// What is remembered, in the order of its times, and what comes from now on.
    pub fn follow(&self) -> (Vec<Arc<Entry>>, broadcast::Receiver<Arc<Entry>>) {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        (recent.all(), self.news.subscribe())
    }
}

/// The last entries, of which those about one node make room for its own: one that floods the log
/// does not take away what it says of others.
#[derive(Debug, Default)]
struct Recent {
    /// By the node at the far end, with their numbers.
    by_node: BTreeMap<Option<String>, VecDeque<(u64, Arc<Entry>)>>,
    length: usize,
    next: u64,
}

impl Recent {
    fn push(&mut self, entry: Arc<Entry>) {
        if self.length == REMEMBERED {
            let most = self.by_node.iter_mut().max_by_key(|(_, of)| of.len());
            if let Some((node, of)) = most {
                of.pop_front();
                if of.is_empty() {
                    let node = node.clone();
                    self.by_node.remove(&node);
                }
            }
        } else {
            self.length += 1;
        }
        let of = self.by_node.entry(entry.node()).or_default();
        of.push_back((self.next, entry));
        self.next += 1;
    }

    /// By the times that they tell of: a walk finds later what was earlier.
    fn all(&self) -> Vec<Arc<Entry>> {
        let mut all: Vec<_> = self.by_node.values().flatten().collect();
        all.sort_by_key(|(number, entry)| (entry.time(), *number));
        all.into_iter().map(|(_, entry)| entry.clone()).collect()
    }
}

/// The time of this machine's clock since 1970.
pub(crate) fn since_1970() -> Duration {
    let now = std::time::SystemTime::now();
    now.duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default()
}

mod file;
mod wire;

pub(crate) use file::write;
pub use wire::json;

#[cfg(test)]
mod tests {
    use mesh_core::Identity;
    use mesh_core::flow::{End, Kind};

    use super::*;

    fn lost(count: u64) -> Entry {
        Entry::Lost {
            time: Duration::from_secs(1),
            what: "denied",
            count,
        }
    }

    #[tokio::test]
    async fn followers_get_what_is_remembered_and_then_what_comes() {
        let log = FlowLog::default();
        for count in 0..REMEMBERED as u64 + 1 {
            log.tell(lost(count));
        }
        let (recent, mut news) = log.follow();
        assert_eq!(recent.len(), REMEMBERED);
        assert_eq!(**recent.first().unwrap(), lost(1));
        log.tell(lost(9_999));
        assert_eq!(*news.recv().await.unwrap(), lost(9_999));
    }

    #[test]
    fn a_node_that_floods_the_log_leaves_room_for_the_others() {
        let end = |node: &str| End {
            address: None,
            port: 0,
            identity: Identity(18),
            node: Some(node.to_owned()),
            is_behind: false,
            tags: Vec::new(),
            user: None,
        };
        let denied = |node: &str| {
            Entry::Flow(Box::new(Described {
                kind: Kind::Denied,
                time: Duration::ZERO,
                start: Duration::ZERO,
                proto: 6,
                direction: Direction::Ingress,
                source: end(node),
                destination: end("me"),
                reason: Some("no rule"),
                rule: None,
                packets: [1, 0],
                bytes: [60, 0],
            }))
        };
        let log = FlowLog::default();
        log.tell(denied("honest"));
        for _ in 0..3 * REMEMBERED {
            log.tell(denied("flooding"));
        }
        log.tell(lost(7));
        let (recent, _) = log.follow();
        assert_eq!(recent.len(), REMEMBERED);
        assert_eq!(**recent.first().unwrap(), denied("honest"));
        assert_eq!(**recent.last().unwrap(), lost(7));
    }
}
