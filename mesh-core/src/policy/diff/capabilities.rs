//! What a new policy changes of the capabilities that services are told of.

use std::collections::BTreeMap;

use super::{Found, What};
use crate::netmap::Rule;
use crate::policy::explain::{End, Explainer};

/// By name and values: the first rule that says so.
type Held = BTreeMap<(String, String), Rule>;

pub(super) fn compared(old: &Explainer<'_>, new: &Explainer<'_>, ends: &[End]) -> Found {
    let mut found = Found::new();
    let grants = |side: &Explainer<'_>| {
        let mut rules = side.compiled.rules.slots();
        rules.any(|(_, rule)| !rule.apps.is_empty())
    };
    if !grants(old) && !grants(new) {
        return found;
    }
    for (from, src) in ends.iter().enumerate() {
        for (to, dst) in ends.iter().enumerate() {
            // Services ask their own node who is there: what lies behind a router has none.
            if dst.nodes.is_empty() {
                continue;
            }
            let (before, after) = (held(old, src, dst), held(new, src, dst));
            for (gained, more, less) in [(true, &after, &before), (false, &before, &after)] {
                for (what, rule) in more.iter().filter(|(what, _)| !less.contains_key(*what)) {
                    let (capability, values) = what.clone();
                    let what = What::Hold { capability, values };
                    let pairs = found.entry((gained, rule.clone(), what)).or_default();
                    pairs.entry(from).or_default().insert(to);
                }
            }
        }
    }
    found
}

fn held(side: &Explainer<'_>, src: &End, dst: &End) -> Held {
    let mut held = Held::new();
    for (from, to) in side.flows(src, dst) {
        let Some((from, to)) = side.classes(src, dst, from, to) else {
            continue;
        };
        let classes = &side.compiled.classes;
        let rules = &side.compiled.rules;
        for (slot, rule, _) in rules.between(&classes[from], &classes[to]) {
            for (name, values) in &rule.apps {
                let what = (name.clone(), values.join(", "));
                held.entry(what).or_insert_with(|| side.rule_at(slot));
            }
        }
    }
    held
}
