//! Keeps watch over the guards of the other interfaces.
//!
//! Those are not the mesh's to take down, so all that is left is to put back what can be put back, and to
//! tell: of what stands, and for an hour of what is over.

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
    /// Since the last look something came and went that may have stood before it.
    Visited,
    /// It was taken off, and hangs again.
    TakenOff,
    /// It does not hang yet.
    Missing,
    /// A foreign program stands before it.
    Behind,
}

impl Lapse {
    fn is_over(self) -> bool {
        self <= Self::TakenOff
    }

    fn text(self) -> &'static str {
        match self {
            Self::Visited => {
                "between two looks a program came and went that may have stood before the guard"
            }
            Self::TakenOff => "the guard was taken off",
            Self::Missing => "no guard hung yet",
            Self::Behind => "a foreign program stood before the guard",
        }
    }
}

/// The watch over all guards together.
#[derive(Clone, Debug)]
pub struct GuardVigil {
    /// When each was last found in its place.
    seen: Instant,
    stands: Option<(Lapse, String)>,
    past: Option<Past<(Lapse, String)>>,
}

impl GuardVigil {
    pub fn new(now: Instant) -> Self {
        Self {
            seen: now,
            stands: None,
            past: None,
        }
    }

    /// The watch while another device of the mesh is there.
    pub fn next(&self, now: Instant) -> Self {
        let mut next = self.clone();
        if next.stands.is_some() {
            next.handle_lapses(&[], now);
        }
        Self { seen: now, ..next }
    }

    /// What was found, by interface; nothing of those whose guard is as it should be.
    pub fn handle_lapses(&mut self, lapses: &[(String, Lapse)], now: Instant) {
        let worst = lapses.iter().map(|(_, lapse)| *lapse).max();
        let found = worst.map(|worst| {
            let of = lapses.iter().filter(|(_, lapse)| *lapse == worst);
            (worst, named(of.map(|(interface, _)| interface.as_str())))
        });
        let stands = self.stands.take();
        match found {
            Some(found) if !found.0.is_over() => self.stands = Some(found),
            found => {
                let exposed = now.saturating_duration_since(self.seen);
                if let Some(over) = stands.max(found)
                    && (over.0 != Lapse::Missing || exposed > USUAL)
                {
                    Past::add(&mut self.past, over, Some(exposed), now);
                }
                self.seen = now;
            }
        }
    }

    /// What to tell people, by name.
    pub fn conditions(&self, now: Instant) -> [(&'static str, Option<Condition>); 2] {
        let stands = self.stands.as_ref().map(|(lapse, interfaces)| Condition {
            severity: Severity::Warning,
            text: match lapse {
                Lapse::Missing => format!("no guard hangs yet on {interfaces}"),
                _ => format!("a foreign program stands before the guard on {interfaces}"),
            },
            next_step: match lapse {
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
            let (lapse, interfaces) = &past.what;
            Condition {
                severity: Severity::Warning,
                text: format!(
                    "{} on {interfaces}, {}: packets from there may have reached this node's mesh addresses {}",
                    lapse.text(),
                    past.when(),
                    past.exposed()
                ),
                next_step: "find out which program or person put something there, or made so many interfaces at once",
            }
        });
        [(GUARD_BYPASSED, stands), (GUARD_WAS_BYPASSED, past)]
    }
}

/// `eth0, eth1`; of many the first few and their number.
fn named<'a>(interfaces: impl Iterator<Item = &'a str>) -> String {
    let interfaces: Vec<&str> = interfaces.collect();
    match interfaces.len() {
        0..=NAMED => interfaces.join(", "),
        many => format!(
            "{} and {} more",
            interfaces[..NAMED].join(", "),
            many - NAMED
        ),
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

    fn texts(vigil: &GuardVigil, now: Instant) -> [Option<String>; 2] {
        let conditions = vigil.conditions(now);
        conditions.map(|(_, condition)| condition.map(|condition| condition.text))
    }

    #[test]
    fn what_stands_is_told_while_it_stands_and_for_an_hour_after() {
        let start = start();
        let at = |ticks: u32| start + TICK * ticks;
        let mut vigil = GuardVigil::new(start);
        vigil.handle_lapses(&[], at(1));
        assert_eq!(texts(&vigil, at(1)), [None, None]);
        vigil.handle_lapses(&[("eth1".to_owned(), Lapse::Behind)], at(2));
        let [Some(stands), None] = texts(&vigil, at(2)) else {
            panic!("it stands");
        };
        assert_eq!(stands, "a foreign program stands before the guard on eth1");
        vigil.handle_lapses(&[], at(4));
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
            vigil.handle_lapses(&lapses, start + TICK * ticks);
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
        let mut lapses: Vec<_> = (0..300)
            .map(|n| (format!("veth{n}"), Lapse::Missing))
            .collect();
        lapses.push(("eth0".to_owned(), Lapse::TakenOff));
        vigil.handle_lapses(&lapses, start + TICK);
        let [Some(stands), None] = texts(&vigil, start + TICK) else {
            panic!("they are missing");
        };
        assert_eq!(
            stands,
            "no guard hangs yet on veth0, veth1, veth2, veth3 and 296 more"
        );
        let mut short = vigil.clone();
        short.handle_lapses(&[], start + TICK * 2);
        assert_eq!(texts(&short, start + TICK * 2), [None, None]);
        vigil.handle_lapses(&[], start + TICK * 10);
        let [None, Some(past)] = texts(&vigil, start + TICK * 10) else {
            panic!("it was long");
        };
        assert!(past.starts_with("no guard hung yet on veth0,"), "{past}");
    }
}
