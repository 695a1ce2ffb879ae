//! Keeps watch over the programs on the mesh's device.
//!
//! No program can keep a foreign one from being put before it, nor itself from being taken off, and
//! packets pass unjudged until somebody looks. So whoever looks and does not find ours first closes
//! the device before anything else, and says for how long it may have been open.

use std::time::{Duration, Instant};

use crate::health::{Condition, Severity};

mod guards;
mod past;

pub use guards::{GUARD_BYPASSED, GUARD_WAS_BYPASSED, GuardVigil, Lapse};
use past::{Exposed, Past, for_at_most};

/// Where our programs are, from best to worst.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Standing {
    /// Attached, and first.
    First,
    /// The same, but since the last answer something came that is no longer there. It may have stood first.
    FirstAgain,
    /// Attached, behind something of somebody else that may end the chain.
    Behind,
    /// Not attached: nothing filters.
    Gone,
}

/// What is to be done now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    Nothing,
    /// Take the device down, and tell [`Vigil::handle_closed`].
    Close,
    /// The device is down: put the programs back.
    Hang,
    /// The device may come up.
    Open,
}

/// How long the kernel may fail to answer before its silence counts as an answer.
const BLIND: Duration = Duration::from_secs(1);
/// Names of the conditions.
pub const BYPASSED: &str = "FilterBypassed";
pub const WAS_BYPASSED: &str = "FilterWasBypassed";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    Behind,
    /// Perhaps.
    Visited,
    Gone,
    Blind,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// `seen`: when the programs were last found in their place; `None`: by no agent that still runs.
    Open {
        seen: Option<Instant>,
    },
    Closing {
        seen: Option<Instant>,
        fault: Fault,
    },
    Closed {
        fault: Fault,
        exposed: Exposed,
    },
}

/// The watch over one device.
#[derive(Debug)]
pub struct Vigil {
    state: State,
    /// When it, or a device before it, was open to all.
    past: Option<Past<Fault>>,
}

impl Vigil {
    /// From the moment at which the programs were hung. `found` is where an earlier agent's were then, if
    /// it left any on this device.
    pub fn new(found: Option<Standing>, now: Instant) -> Self {
        let fault = match found {
            Some(Standing::Behind) => Some(Fault::Behind),
            Some(Standing::Gone) => Some(Fault::Gone),
            Some(Standing::First | Standing::FirstAgain) | None => None,
        };
        Self {
            state: State::Open {
                seen: fault.is_none().then_some(now),
            },
            past: fault.map(|fault| Past::new(fault, None, now)),
        }
    }

    /// The vigil over the device that is made after this one, like [`Self::new`]: people are told of what
    /// happened, whatever became of the device on which it did.
    pub fn next(&self, found: Option<Standing>, now: Instant) -> Self {
        let mut past = self.past;
        match self.state {
            State::Open { .. } => {}
            State::Closing { seen, fault } => {
                let exposed = seen.map(|seen| now.saturating_duration_since(seen));
                Past::add(&mut past, fault, exposed, now);
            }
            State::Closed { fault, exposed } => Past::add(&mut past, fault, exposed, now),
        }
        let next = Self::new(found, now);
        Self {
            past: next.past.or(past),
            ..next
        }
    }

    /// What the kernel said; `None` if it could not be asked. It was so at some time between `asked` and `now`.
    pub fn handle_standing(
        &mut self,
        standing: Option<Standing>,
        asked: Instant,
        now: Instant,
    ) -> Step {
        match (self.state, standing) {
            (State::Open { .. }, Some(Standing::First)) => {
                self.state = State::Open { seen: Some(asked) };
                Step::Nothing
            }
            (State::Open { seen }, Some(Standing::FirstAgain)) => {
                if let Some(seen) = seen {
                    let exposed = Some(now.saturating_duration_since(seen));
                    Past::add(&mut self.past, Fault::Visited, exposed, now);
                }
                self.state = State::Open { seen: Some(asked) };
                Step::Nothing
            }
            (State::Open { seen: Some(seen) }, None)
                if now.saturating_duration_since(seen) < BLIND =>
            {
                Step::Nothing
            }
            (State::Open { seen }, standing) => {
                let fault = match standing {
                    Some(Standing::Gone) => Fault::Gone,
                    Some(_) => Fault::Behind,
                    None => Fault::Blind,
                };
                // What this agent found and still finds is not over yet.
                if seen.is_none() {
                    self.past = None;
                }
                self.state = State::Closing { seen, fault };
                Step::Close
            }
            (State::Closed { fault, exposed }, Some(Standing::First | Standing::FirstAgain)) => {
                self.state = State::Open { seen: Some(asked) };
                Past::add(&mut self.past, fault, exposed, now);
                Step::Open
            }
            (State::Closed { .. }, Some(Standing::Gone)) => Step::Hang,
            // Whoever has the right may have set it up again.
            (State::Closing { .. } | State::Closed { .. }, _) => Step::Close,
        }
    }

    /// The device is down.
    pub fn handle_closed(&mut self, now: Instant) {
        if let State::Closing { seen, fault } = self.state {
            let exposed = seen.map(|seen| now.saturating_duration_since(seen));
            self.state = State::Closed { fault, exposed };
        }
    }

    /// What to tell people, by name.
    pub fn conditions(
        &self,
        interface: &str,
        now: Instant,
    ) -> [(&'static str, Option<Condition>); 2] {
        let stands = match self.state {
            State::Open { .. } => None,
            State::Closing { seen, fault } => {
                let open = seen.map(|seen| now.saturating_duration_since(seen));
                Some((
                    fault,
                    format!(
                        "it is still up; packets may have passed unjudged {}",
                        for_at_most(open)
                    ),
                ))
            }
            State::Closed { fault, exposed } => Some((
                fault,
                format!(
                    "it was taken down; packets may have passed unjudged {}",
                    for_at_most(exposed)
                ),
            )),
        };
        let after = match stands {
            None => {
                "the filter is in its place again; find out which program or person put something there"
            }
            Some(_) => {
                "that was over before what stands now; find out which program or person put something there"
            }
        };
        let stands = stands.map(|(fault, text)| Condition {
            severity: Severity::Error,
            text: format!("{} on {interface}: {text}", fault.text()),
            next_step: fault.next_step(),
        });
        let past = self.past.filter(|past| past.is_remembered(now));
        let past = past.map(|past| Condition {
            severity: Severity::Warning,
            text: format!(
                "{} on {interface}, {}: packets may have passed unjudged {}",
                past.what.text(),
                past.when(),
                past.exposed()
            ),
            next_step: after,
        });
        [(BYPASSED, stands), (WAS_BYPASSED, past)]
    }
}

impl Fault {
    fn text(self) -> &'static str {
        match self {
            Self::Behind => "a foreign program stood before the filter",
            Self::Visited => {
                "between two looks a program came and went that may have stood before the filter,"
            }
            Self::Gone => "the filter's programs were taken off",
            Self::Blind => "the kernel would not say whether the filter is in its place",
        }
    }

    fn next_step(self) -> &'static str {
        match self {
            Self::Behind | Self::Visited => {
                "take it off (`bpftool net list`, `tc filter show`): the interface comes up by itself once the filter is first again"
            }
            Self::Gone => "the agent puts them back and the interface comes up by itself",
            Self::Blind => {
                "the agent needs CAP_NET_ADMIN and CAP_BPF; its log has the kernel's answer"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "a base for virtual time")]
    fn start() -> Instant {
        Instant::now()
    }

    fn look(vigil: &mut Vigil, standing: Option<Standing>, at: Instant) -> Step {
        vigil.handle_standing(standing, at, at)
    }

    const TICK: Duration = Duration::from_millis(500);

    fn texts(vigil: &Vigil, now: Instant) -> Vec<(&'static str, String)> {
        let conditions = vigil.conditions("mesh0", now).into_iter();
        conditions
            .filter_map(|(name, condition)| Some((name, condition?.text)))
            .collect()
    }

    #[test]
    fn a_foreign_program_closes_the_device_until_it_is_gone() {
        let start = start();
        let mut vigil = Vigil::new(None, start);
        let at = |ticks: u32| start + TICK * ticks;
        assert_eq!(
            look(&mut vigil, Some(Standing::First), at(1)),
            Step::Nothing
        );
        assert_eq!(texts(&vigil, at(1)), []);
        assert_eq!(look(&mut vigil, Some(Standing::Behind), at(2)), Step::Close);
        vigil.handle_closed(at(2) + Duration::from_millis(10));
        let text = "a foreign program stood before the filter on mesh0: it was taken down; packets may have passed unjudged for at most 510.0ms";
        assert_eq!(texts(&vigil, at(3)), [(BYPASSED, text.to_owned())]);
        assert_eq!(look(&mut vigil, Some(Standing::Behind), at(3)), Step::Close);
        assert_eq!(look(&mut vigil, Some(Standing::First), at(4)), Step::Open);
        let names: Vec<_> = texts(&vigil, at(4))
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(names, [WAS_BYPASSED]);
        assert_eq!(texts(&vigil, at(4) + past::REMEMBERED), []);
    }

    #[test]
    fn programs_taken_off_are_put_back_behind_a_closed_door() {
        let start = start();
        let mut vigil = Vigil::new(None, start);
        let gone = Some(Standing::Gone);
        assert_eq!(look(&mut vigil, gone, start + TICK), Step::Close);
        // Until it is closed there is nothing else to do.
        assert_eq!(look(&mut vigil, gone, start + TICK), Step::Close);
        vigil.handle_closed(start + TICK);
        assert_eq!(look(&mut vigil, gone, start + TICK), Step::Hang);
        assert_eq!(
            look(&mut vigil, Some(Standing::First), start + TICK),
            Step::Open
        );
    }

    #[test]
    fn what_happened_while_no_agent_ran_is_told_as_such() {
        let start = start();
        let mut vigil = Vigil::new(Some(Standing::Behind), start);
        assert_eq!(look(&mut vigil, Some(Standing::Behind), start), Step::Close);
        vigil.handle_closed(start);
        let text = "a foreign program stood before the filter on mesh0: it was taken down; packets may have passed unjudged since some time before this agent started";
        assert_eq!(texts(&vigil, start), [(BYPASSED, text.to_owned())]);
        let first = Some(Standing::First);
        assert_eq!(look(&mut vigil, first, start + TICK), Step::Open);
        let names = texts(&vigil, start + TICK);
        assert_eq!(names[0].0, WAS_BYPASSED);

        let mut vigil = Vigil::new(Some(Standing::Gone), start);
        assert_eq!(look(&mut vigil, first, start + TICK), Step::Nothing);
        let text = "the filter's programs were taken off on mesh0, within the last hour: packets may have passed unjudged since some time before this agent started";
        assert_eq!(texts(&vigil, start), [(WAS_BYPASSED, text.to_owned())]);
        assert_eq!(texts(&Vigil::new(first, start), start), []);
    }

    #[test]
    fn of_two_times_within_the_hour_the_first_is_not_said_to_have_ended_well() {
        let start = start();
        let mut vigil = bypassed_once(start);
        let next_steps = |vigil: &Vigil| {
            vigil
                .conditions("mesh0", start)
                .map(|(_, condition)| condition.map(|condition| condition.next_step))
        };
        let [None, Some(past)] = next_steps(&vigil) else {
            panic!("only the past is told");
        };
        assert!(past.contains("in its place again"), "{past}");
        assert_eq!(look(&mut vigil, Some(Standing::Behind), start), Step::Close);
        let [Some(_), Some(past)] = next_steps(&vigil) else {
            panic!("both are told");
        };
        assert!(!past.contains("in its place again"), "{past}");
    }

    #[test]
    fn what_happened_on_one_device_is_told_on_the_next() {
        let start = start();
        let vigil = bypassed_once(start);
        let told = texts(&vigil, start);
        let mut next = vigil.next(None, start + TICK);
        assert_eq!(texts(&next, start + TICK), told);
        assert_eq!(texts(&next, start + past::REMEMBERED), []);

        // The device is taken away while it is closed.
        let at = start + TICK * 2;
        assert_eq!(look(&mut next, Some(Standing::Gone), at), Step::Close);
        for is_closed in [false, true] {
            if is_closed {
                next.handle_closed(at);
            }
            let text = "the filter's programs were taken off on mesh0, 2 times, the last within the last hour: packets may have passed unjudged for at most 500.0ms in all";
            let last = next.next(None, at);
            assert_eq!(texts(&last, at), [(WAS_BYPASSED, text.to_owned())]);
        }
    }

    /// A foreign program stood before the filter and is gone.
    fn bypassed_once(start: Instant) -> Vigil {
        let mut vigil = Vigil::new(None, start);
        look(&mut vigil, Some(Standing::Behind), start);
        vigil.handle_closed(start);
        look(&mut vigil, Some(Standing::First), start);
        vigil
    }

    #[test]
    fn what_came_and_went_between_two_looks_is_told_and_adds_up() {
        let start = start();
        let mut vigil = Vigil::new(None, start);
        let again = Some(Standing::FirstAgain);
        for ticks in 1..=2 {
            assert_eq!(look(&mut vigil, again, start + TICK * ticks), Step::Nothing);
        }
        let text = "between two looks a program came and went that may have stood before the filter, on mesh0, 2 times, the last within the last hour: packets may have passed unjudged for at most 1.0s in all";
        let now = start + TICK * 2;
        assert_eq!(texts(&vigil, now), [(WAS_BYPASSED, text.to_owned())]);
        // It is first, so a closed device may open.
        assert_eq!(look(&mut vigil, Some(Standing::Behind), now), Step::Close);
        vigil.handle_closed(now);
        assert_eq!(look(&mut vigil, again, now), Step::Open);
    }

    #[test]
    fn an_answer_that_took_long_is_of_any_moment_meanwhile() {
        let start = start();
        let mut vigil = Vigil::new(None, start);
        let first = Some(Standing::First);
        vigil.handle_standing(first, start, start + TICK);
        let again = Some(Standing::FirstAgain);
        vigil.handle_standing(again, start + TICK * 2, start + TICK * 3);
        let [(_, text)] = &texts(&vigil, start + TICK * 3)[..] else {
            panic!("the past is told");
        };
        assert!(text.ends_with("for at most 1.5s"), "{text}");
    }

    #[test]
    fn silence_is_an_answer_after_a_second() {
        let start = start();
        let mut vigil = Vigil::new(None, start);
        assert_eq!(look(&mut vigil, None, start + TICK), Step::Nothing);
        assert_eq!(look(&mut vigil, None, start + TICK * 2), Step::Close);
    }
}
