//! Keeps watch over the guards of the other interfaces.
//!
//! Those are not the mesh's to take down, so all that is left is to put back what can be put back, and to
//! tell: of what stands, and for an hour of what is over.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::past::Past;
use crate::health::{Condition, Severity};

/// Names of the conditions.
pub const GUARD_BYPASSED: &str = "GuardBypassed";
pub const GUARD_WAS_BYPASSED: &str = "GuardWasBypassed";

/// Any new interface has no guard at first; of so short a time nobody is told afterwards.
const USUAL: Duration = Duration::from_secs(1);
/// Interfaces that are named before the rest is counted.
const NAMED: usize = 4;

/// What is wrong with one guard, from best to worst.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Lapse {
    /// It does not hang yet.
    Missing,
    /// Since the last look something came and went that may have stood before it.
    Visited,
    /// It was taken off, and hangs again.
    TakenOff,
    /// A foreign program stands before it.
    Behind,
}

impl Lapse {
    /// Once it is found.
    fn is_over(self) -> bool {
        matches!(self, Self::Visited | Self::TakenOff)
    }

    fn text(self) -> &'static str {
        match self {
            Self::Missing => "no guard hung yet",
            Self::Visited => {
                "between two looks a program came and went that may have stood before the guard"
            }
            Self::TakenOff => "the guard was taken off",
            Self::Behind => "a foreign program stood before the guard",
        }
    }
}

/// The worst, and where.
#[derive(Clone, Debug)]
struct Found {
    lapse: Lapse,
    interfaces: BTreeSet<String>,
}

impl Found {
    fn worst<'a>(lapses: impl Iterator<Item = &'a (String, Lapse)>) -> Option<Self> {
        let found = lapses.map(|(interface, lapse)| Self {
            lapse: *lapse,
            interfaces: [interface.clone()].into(),
        });
        found.reduce(Self::or)
    }

    fn or(mut self, mut other: Self) -> Self {
        match self.lapse.cmp(&other.lapse) {
            Ordering::Less => other,
            Ordering::Greater => self,
            Ordering::Equal => {
                self.interfaces.append(&mut other.interfaces);
                self
            }
        }
    }

    /// `eth0, eth1`; of many the first few and their number.
    fn names(&self) -> String {
        let first: Vec<&str> = self
            .interfaces
            .iter()
            .map(String::as_str)
            .take(NAMED)
            .collect();
        let first = first.join(", ");
        match self.interfaces.len().saturating_sub(NAMED) {
            0 => first,
            more => format!("{first} and {more} more"),
        }
    }
}

/// The watch over all guards together.
#[derive(Clone, Debug)]
pub struct GuardVigil {
    /// When they were last asked about.
    looked: Instant,
    stands: Option<Found>,
    /// The worst since something stands, and the last look before.
    since: Option<(Found, Instant)>,
    past: Option<Past<Found>>,
}

impl GuardVigil {
    pub fn new(now: Instant) -> Self {
        Self {
            looked: now,
            stands: None,
            since: None,
            past: None,
        }
    }

    /// The watch while another device of the mesh is there.
    pub fn next(&self, now: Instant) -> Self {
        let mut next = self.clone();
        next.handle_lapses(&[], now, now);
        next
    }

    /// What was found, by interface, at some time between `asked` and `now`; nothing of those whose guard is as
    /// it should be.
    pub fn handle_lapses(&mut self, lapses: &[(String, Lapse)], asked: Instant, now: Instant) {
        let over = lapses.iter().filter(|(_, lapse)| lapse.is_over());
        if let Some(over) = Found::worst(over) {
            self.remember(over, self.looked, now);
        }
        let stands = lapses.iter().filter(|(_, lapse)| !lapse.is_over());
        self.stands = Found::worst(stands);
        match (self.since.take(), self.stands.clone()) {
            (Some((before, from)), Some(found)) => self.since = Some((before.or(found), from)),
            (None, Some(found)) => self.since = Some((found, self.looked)),
            (Some((before, from)), None) => {
                let is_news =
                    before.lapse != Lapse::Missing || now.saturating_duration_since(from) > USUAL;
                if is_news {
                    self.remember(before, from, now);
                }
            }
            (None, None) => {}
        }
        self.looked = asked;
    }

    fn remember(&mut self, found: Found, from: Instant, now: Instant) {
        let exposed = Some(now.saturating_duration_since(from));
        Past::add(&mut self.past, found, exposed, now);
    }

    /// What to tell people, by name.
    pub fn conditions(&self, now: Instant) -> [(&'static str, Option<Condition>); 2] {
        let stands = self.stands.as_ref().map(|found| Condition {
            severity: Severity::Warning,
            text: match found.lapse {
                Lapse::Missing => format!("no guard hangs yet on {}", found.names()),
                _ => format!("a foreign program stands before the guard on {}", found.names()),
            },
            next_step: match found.lapse {
                Lapse::Missing => {
                    "the kernel takes some 20 ms for each; until then a neighbour there may reach this node's mesh addresses (CVE-2019-14899)"
                }
                _ => {
                    "a neighbour there may reach this node's mesh addresses past the policy (CVE-2019-14899): attach that program behind the guard"
                }
            },
        });
        let past = self.past.as_ref().filter(|past| past.is_remembered(now));
        let past = past.map(|past| {
            let found = &past.what;
            Condition {
                severity: Severity::Warning,
                text: format!(
                    "{} on {}, {}: packets from there may have reached this node's mesh addresses {}",
                    found.lapse.text(),
                    found.names(),
                    past.when(),
                    past.exposed()
                ),
                next_step: "find out which program or person put something there, or made so many interfaces at once",
            }
        });
        [(GUARD_BYPASSED, stands), (GUARD_WAS_BYPASSED, past)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "a base for virtual time")]
    fn start() -> Instant {
        Instant::now()
    }

    const TICK: Duration = Duration::from_millis(200);

    fn look(vigil: &mut GuardVigil, lapses: &[(String, Lapse)], at: Instant) {
        vigil.handle_lapses(lapses, at, at);
    }

    fn texts(vigil: &GuardVigil, now: Instant) -> [Option<String>; 2] {
        let conditions = vigil.conditions(now);
        conditions.map(|(_, condition)| condition.map(|condition| condition.text))
    }

    #[test]
    fn what_stands_is_told_while_it_stands_and_for_an_hour_after() {
        let start = start();
        let at = |ticks: u32| start + TICK * ticks;
        let mut vigil = GuardVigil::new(start);
        look(&mut vigil, &[], at(1));
        assert_eq!(texts(&vigil, at(1)), [None, None]);
        look(&mut vigil, &[("eth1".to_owned(), Lapse::Behind)], at(2));
        let [Some(stands), None] = texts(&vigil, at(2)) else {
            panic!("it stands");
        };
        assert_eq!(stands, "a foreign program stands before the guard on eth1");
        look(&mut vigil, &[], at(4));
        let past = "a foreign program stood before the guard on eth1, within the last hour: packets from there may have reached this node's mesh addresses for at most 600.0ms";
        assert_eq!(texts(&vigil, at(4)), [None, Some(past.to_owned())]);
        assert_eq!(
            texts(&vigil, at(4) + super::super::past::REMEMBERED),
            [None, None]
        );
    }

    #[test]
    fn what_is_over_when_it_is_found_adds_up() {
        let start = start();
        let mut vigil = GuardVigil::new(start);
        for ticks in 1..=3 {
            let lapses = [("eth1".to_owned(), Lapse::Visited)];
            look(&mut vigil, &lapses, start + TICK * ticks);
        }
        let [None, Some(past)] = texts(&vigil, start + TICK * 3) else {
            panic!("it is over");
        };
        assert!(
            past.contains("3 times, the last within the last hour"),
            "{past}"
        );
        assert!(past.ends_with("for at most 600.0ms in all"), "{past}");
    }

    #[test]
    fn of_many_interfaces_the_worst_are_named() {
        let start = start();
        let mut vigil = GuardVigil::new(start);
        let lapses: Vec<_> = (0..300)
            .map(|n| (format!("veth{n}"), Lapse::Missing))
            .collect();
        look(&mut vigil, &lapses, start + TICK);
        let [Some(stands), None] = texts(&vigil, start + TICK) else {
            panic!("they are missing");
        };
        assert_eq!(
            stands,
            "no guard hangs yet on veth0, veth1, veth10, veth100 and 296 more"
        );
        let mut short = vigil.clone();
        look(&mut short, &[], start + TICK * 2);
        assert_eq!(texts(&short, start + TICK * 2), [None, None]);
        look(&mut vigil, &[], start + TICK * 10);
        let [None, Some(past)] = texts(&vigil, start + TICK * 10) else {
            panic!("it was long");
        };
        assert!(past.starts_with("no guard hung yet on veth0,"), "{past}");
    }

    #[test]
    fn what_is_missing_for_a_moment_hides_nothing_else() {
        let start = start();
        let at = |ticks: u32| start + TICK * ticks;
        let lapse = |interface: &str, lapse| (interface.to_owned(), lapse);
        let past = |vigil: &GuardVigil| texts(vigil, at(5))[1].clone().unwrap();
        for (before, text) in [
            (Lapse::TakenOff, "the guard was taken off on eth0,"),
            (Lapse::Visited, "between two looks"),
            (
                Lapse::Behind,
                "a foreign program stood before the guard on eth0,",
            ),
        ] {
            let mut vigil = GuardVigil::new(start);
            let lapses = [lapse("veth", Lapse::Missing), lapse("eth0", before)];
            look(&mut vigil, &lapses, at(1));
            look(&mut vigil, &lapses[..1], at(2));
            look(&mut vigil, &[], at(3));
            assert!(past(&vigil).starts_with(text), "{}", past(&vigil));
        }
        // One that stands hides none that came and went elsewhere.
        let mut vigil = GuardVigil::new(start);
        look(&mut vigil, &[lapse("eth1", Lapse::Behind)], at(1));
        let both = [lapse("eth1", Lapse::Behind), lapse("eth2", Lapse::Visited)];
        look(&mut vigil, &both, at(2));
        assert!(past(&vigil).contains("on eth2,"), "{}", past(&vigil));
        look(&mut vigil, &[lapse("eth3", Lapse::Behind)], at(3));
        look(&mut vigil, &[], at(4));
        assert!(past(&vigil).contains("on eth1, eth3,"), "{}", past(&vigil));
        assert!(past(&vigil).ends_with("for at most 1.0s in all"));
    }
}
