//! What is over, and is told all the same: when packets may have passed that should not have.

use std::time::{Duration, Instant};

/// How long people are told of it.
pub(super) const REMEMBERED: Duration = Duration::from_secs(3600);

/// For how long at most packets may have passed; `None`: since some time before this agent started.
pub(super) type Exposed = Option<Duration>;

/// The last time and, of those before it, all that are not an hour apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Past<W> {
    /// What was wrong the last time.
    pub(super) what: W,
    /// All times together.
    exposed: Exposed,
    times: u32,
    over: Instant,
}

impl<W> Past<W> {
    pub(super) fn new(what: W, exposed: Exposed, over: Instant) -> Self {
        Self {
            what,
            exposed,
            times: 1,
            over,
        }
    }

    pub(super) fn add(past: &mut Option<Self>, what: W, exposed: Exposed, over: Instant) {
        let mut next = Self::new(what, exposed, over);
        if let Some(before) = past.take().filter(|before| before.is_remembered(over)) {
            next.exposed = before.exposed.zip(exposed).map(|(a, b)| a + b);
            next.times += before.times;
        }
        *past = Some(next);
    }

    pub(super) fn is_remembered(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.over) < REMEMBERED
    }

    /// `within the last hour`.
    pub(super) fn when(&self) -> String {
        match self.times {
            1 => "within the last hour".to_owned(),
            times => format!("{times} times, the last within the last hour"),
        }
    }

    /// `for at most 210.0ms`.
    pub(super) fn exposed(&self) -> String {
        let exposed = for_at_most(self.exposed);
        match (self.times, self.exposed) {
            (1, _) | (_, None) => exposed,
            _ => format!("{exposed} in all"),
        }
    }
}

pub(super) fn for_at_most(exposed: Exposed) -> String {
    match exposed {
        Some(exposed) => format!("for at most {exposed:.1?}"),
        None => "since some time before this agent started".to_owned(),
    }
}
