//! The reference: who may know whom, said in the simplest way there is.

use std::collections::{BTreeMap, BTreeSet};

/// Tags of the simulated mesh: `tag:t0` to `tag:t3`.
pub(crate) const TAGS: usize = 4;

/// Which tag may open flows to which, one bit for each pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Pairs(pub(crate) u16);

impl Pairs {
    pub(crate) fn allows(self, from: usize, to: usize) -> bool {
        self.0 & (1 << (from * TAGS + to)) != 0
    }

    /// The same as policy text.
    pub(crate) fn text(self) -> String {
        let rules: Vec<String> = (0..TAGS)
            .flat_map(|from| (0..TAGS).map(move |to| (from, to)))
            .filter(|(from, to)| self.allows(*from, *to))
            .map(|(from, to)| {
                format!(r#"{{"action": "accept", "src": ["tag:t{from}"], "dst": ["tag:t{to}:*"]}}"#)
            })
            .collect();
        let owners: Vec<String> = (0..TAGS)
            .map(|tag| format!(r#""tag:t{tag}": []"#))
            .collect();
        format!(
            r#"{{"tagOwners": {{{}}}, "acls": [{}]}}"#,
            owners.join(", "),
            rules.join(", ")
        )
    }
}

/// The nodes that are in the mesh with a valid key, by their number in the test, with their tag.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    pub(crate) valid: BTreeMap<usize, usize>,
    pub(crate) expired: BTreeSet<usize>,
}

impl Model {
    /// Whom a node must know: exactly those that some rule joins it with.
    pub(crate) fn peers(&self, pairs: Pairs, me: usize) -> BTreeSet<usize> {
        let Some(own) = self.valid.get(&me) else {
            return BTreeSet::new();
        };
        let joined = |tag: usize| pairs.allows(*own, tag) || pairs.allows(tag, *own);
        let others = self.valid.iter().filter(|(other, _)| **other != me);
        others
            .filter(|(_, tag)| joined(**tag))
            .map(|(other, _)| *other)
            .collect()
    }
}
