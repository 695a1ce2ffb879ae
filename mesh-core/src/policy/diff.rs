//! What a new policy changes, said as who gains and who loses what.
//!
//! Two texts can differ in every line and mean the same, so what is compared is what they come to in
//! a given world. Nodes that neither policy can tell from each other stand for each other; what is
//! said in the end names owners where all of their nodes are meant, else the nodes.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::compile::CompiledPolicy;
use super::explain::{Answer, End, Explainer, Opened, rule_json, services, some};
use super::syntax::Document;
use crate::netmap::{PortRange, Rule};
use crate::node::NodeId;
use crate::world::World;

mod capabilities;
mod logins;
mod nodes;

/// One thing that some may now do, or no longer.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Change {
    pub gained: bool,
    /// The rule that allows it, or that allowed it.
    pub rule: Rule,
    pub what: What,
    /// Owners, nodes, prefixes.
    pub sources: Vec<String>,
    pub destinations: Vec<String>,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum What {
    /// Open flows: `tcp/22`.
    Open(String),
    /// Log in by SSH as this account, after a check where one is asked for.
    LogIn { account: String, checked: bool },
    /// Be known to the destination's services with this, and with these values.
    Hold { capability: String, values: String },
    /// Have this attribute.
    Have(String),
    /// Serve these routes without an administrator's approval.
    Serve(String),
    /// Get addresses for new nodes from there.
    Draw(String),
}

/// By what is gained or lost through which rule: from which ends to which.
type Found = BTreeMap<(bool, Rule, What), BTreeMap<usize, BTreeSet<usize>>>;

/// What `new` changes of `old`, each with what it compiles to in this world.
pub fn diff(
    world: &World,
    old: (&Document, &CompiledPolicy),
    new: (&Document, &CompiledPolicy),
) -> Vec<Change> {
    let old = Explainer::new(world, old.0, old.1);
    let new = Explainer::new(world, new.0, new.1);
    let ends = joint(&old, &new);
    let mut changes = told(&new, &ends, reach(&old, &new, &ends));
    let held = capabilities::compared(&old, &new, &ends);
    changes.extend(told(&new, &ends, held));
    let ends = new.by_owner();
    changes.extend(told(&new, &ends, logins::compared(&old, &new, &ends)));
    changes.extend(told(&new, &ends, nodes::by_owner(&old, &new, &ends)));
    let ends: Vec<End> = new.ids().map(|id| new.of_nodes(vec![id])).collect();
    changes.extend(told(&new, &ends, nodes::attributes(&old, &new, &ends)));
    changes
}

fn reach(old: &Explainer<'_>, new: &Explainer<'_>, ends: &[End]) -> Found {
    let mut found = Found::new();
    for (from, src) in ends.iter().enumerate() {
        for (to, dst) in ends.iter().enumerate() {
            let (before, after) = (old.opened(src, dst), new.opened(src, dst));
            if before == after {
                continue;
            }
            for (gained, more, less) in [(true, &after, &before), (false, &before, &after)] {
                for (rule, ranges) in without(more, less) {
                    let what = What::Open(services(ranges.into_iter()));
                    let pairs = found.entry((gained, rule, what)).or_default();
                    pairs.entry(from).or_default().insert(to);
                }
            }
        }
    }
    found
}

/// The same in names. Sources that gain or lose the same are told of together.
fn told(new: &Explainer<'_>, ends: &[End], found: Found) -> Vec<Change> {
    let owners = new.owners();
    let mut changes = Vec::new();
    for ((gained, rule, what), pairs) in found {
        let mut by_destinations: BTreeMap<BTreeSet<usize>, BTreeSet<usize>> = BTreeMap::new();
        for (from, to) in pairs {
            by_destinations.entry(to).or_default().insert(from);
        }
        for (to, from) in by_destinations {
            changes.push(Change {
                gained,
                rule: rule.clone(),
                what: what.clone(),
                sources: new.described(ends, &from, &owners),
                destinations: new.described(ends, &to, &owners),
            });
        }
    }
    changes
}

/// The changes as lines and as JSON, what is lost first.
pub fn diff_answer(changes: &[Change]) -> Answer {
    let line = |change: &Change| {
        let sources = some(change.sources.iter().cloned());
        let destinations = some(change.destinations.iter().cloned());
        let what = match &change.what {
            What::Open(services) => format!("open {services} to {destinations}"),
            What::LogIn { account, checked } => {
                let check = if *checked { ", after a check" } else { "" };
                format!("log in to {destinations} as {account}{check}")
            }
            What::Hold { capability, values } if values.is_empty() => {
                format!("hold {capability} at {destinations}")
            }
            What::Hold { capability, values } => {
                format!("hold {capability} at {destinations} with {values}")
            }
            What::Have(attribute) => format!("have the attribute {attribute}"),
            What::Serve(routes) => format!("serve {routes} without an administrator"),
            What::Draw(pool) => format!("take addresses of {pool} for new nodes"),
        };
        let at = change.rule.place();
        match change.gained {
            true => format!("+ {sources} may now {what} ({at})"),
            false => format!("- {sources} may no longer {what} (was {at})"),
        }
    };
    let value = |change: &Change| {
        let mut value = json!({
            "change": if change.gained { "gained" } else { "lost" },
            "sources": change.sources,
            "destinations": change.destinations,
            "rule": rule_json(&change.rule),
        });
        match &change.what {
            What::Open(services) => value["services"] = services.as_str().into(),
            What::LogIn { account, checked } => {
                value["login"] = json!({"account": account, "checked": checked});
            }
            What::Hold { capability, values } => {
                value["capability"] = json!({"name": capability, "values": values});
            }
            What::Have(attribute) => value["attribute"] = attribute.as_str().into(),
            What::Serve(routes) => value["routes"] = routes.as_str().into(),
            What::Draw(pool) => value["pool"] = pool.as_str().into(),
        }
        value
    };
    Answer {
        lines: changes.iter().map(line).collect(),
        json: json!({"changes": changes.iter().map(value).collect::<Vec<_>>()}),
    }
}

/// Ends that both policies judge alike throughout.
fn joint(old: &Explainer<'_>, new: &Explainer<'_>) -> Vec<End> {
    let mut nodes: BTreeMap<_, Vec<NodeId>> = BTreeMap::new();
    for id in new.ids() {
        nodes
            .entry((old.kind(id), new.kind(id)))
            .or_default()
            .push(id);
    }
    let mut ends: Vec<End> = nodes.into_values().map(|ids| new.of_nodes(ids)).collect();
    ends.sort_by_key(|end| end.nodes.first().copied());
    let nets: BTreeSet<_> = old
        .pieces()
        .into_keys()
        .chain(new.pieces().into_keys())
        .collect();
    ends.extend(End::behind(&nets));
    ends
}

/// What `more` opens beyond `less`, whichever rule opens it there.
fn without(more: &Opened, less: &Opened) -> BTreeMap<Rule, BTreeSet<(u8, PortRange)>> {
    let mut known: BTreeMap<u8, BTreeSet<PortRange>> = BTreeMap::new();
    for (protocol, ports) in less.values().flatten() {
        known.entry(*protocol).or_default().insert(*ports);
    }
    let mut beyond: BTreeMap<Rule, BTreeSet<(u8, PortRange)>> = BTreeMap::new();
    for (rule, ranges) in more {
        for (protocol, ports) in ranges {
            let holes = known.get(protocol).into_iter().flatten();
            for rest in cut(*ports, holes) {
                beyond
                    .entry(rule.clone())
                    .or_default()
                    .insert((*protocol, rest));
            }
        }
    }
    beyond
}

/// What ascending `holes` leave of a range.
fn cut<'a>(range: PortRange, holes: impl Iterator<Item = &'a PortRange>) -> Vec<PortRange> {
    let mut rest = Vec::new();
    let mut at = u32::from(range.first);
    let last = u32::from(range.last);
    let mut keep = |first: u32, last: u32| {
        if let (Ok(first), Ok(last)) = (u16::try_from(first), u16::try_from(last))
            && first <= last
        {
            rest.push(PortRange { first, last });
        }
    };
    for hole in holes {
        let (first, end) = (u32::from(hole.first), u32::from(hole.last));
        if end < at || first > last {
            continue;
        }
        if first > at {
            keep(at, first - 1);
        }
        at = at.max(end + 1);
    }
    if at <= last {
        keep(at, last);
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_cut_out_of_a_range() {
        let range = |first, last| PortRange { first, last };
        let check = |of, holes: &[PortRange], rest: &[PortRange]| {
            assert_eq!(cut(of, holes.iter()), rest);
        };
        check(range(1, 10), &[], &[range(1, 10)]);
        check(
            range(1, 10),
            &[range(3, 4), range(6, 99)],
            &[range(1, 2), range(5, 5)],
        );
        check(range(1, 10), &[range(0, 65535)], &[]);
        check(
            PortRange::ALL,
            &[range(0, 21), range(23, 65535)],
            &[range(22, 22)],
        );
    }
}
