//! Whether the packet filter of every node has room for its part of the policy.
//!
//! A filter's table holds prefixes of ports and a certain number of them. A text of a megabyte can
//! name enough single ports, between enough kinds of nodes, for more; a node that is told so much
//! keeps what it had before. So whoever sets a policy hears of it before any node does.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::rc::Rc;

use mesh_common::maps::POLICY_CAPACITY;

use super::compile::CompiledPolicy;
use super::entries::Answer;
use super::kinds::Twins;
use super::problem::{Complaints, Problems};
use super::rules::RuleSlot;
use super::syntax::Document;
use crate::netmap::PortRange;
use crate::node::{NodeId, Owner, Tag};

/// Rows of one node's filter, and how many of them each rule takes.
#[derive(Default)]
struct Rows {
    all: usize,
    by_rule: BTreeMap<RuleSlot, usize>,
}

impl CompiledPolicy {
    /// Refuses a policy, of which this was compiled, that some node could not load.
    pub fn room(&self, document: &Document) -> Result<(), Problems> {
        let mut complaints = Complaints::default();
        let counted = self.kinds.iter().map(|kind| (kind, self.counted(kind)));
        let full: Vec<_> = counted
            .filter(|(_, rows)| rows.all > POLICY_CAPACITY as usize)
            .collect();
        if let Some((kind, rows)) = full
            .iter()
            .min_by_key(|(kind, rows)| (Reverse(rows.all), kind.nodes.first()))
            && let Some((rule, most)) = rows
                .by_rule
                .iter()
                .min_by_key(|(rule, most)| (Reverse(**most), self.rules.span(**rule)))
        {
            let nodes: usize = full.iter().map(|(kind, _)| kind.nodes.len()).sum();
            let first = kind.nodes.first();
            let name = first.map_or_else(String::new, |id| self.name(*id));
            let others = match nodes - 1 {
                0 => String::new(),
                others => format!(" ({others} more nodes have no room either)"),
            };
            let message = format!(
                "the packet filter of {name} would need {} rows and has room for {POLICY_CAPACITY}: \
                 {most} of them are for this rule; write ranges instead of single ports, or name \
                 fewer kinds of nodes{others}",
                rows.all
            );
            complaints.add(self.rules.span(*rule), message);
        }
        complaints.settle(document.text())
    }

    /// How many rows a node's packet filter has by it.
    pub fn rows(&self, id: NodeId) -> usize {
        let placed = self.nodes.get(&id);
        placed.map_or(0, |placed| self.counted(&self.kinds[placed.kind]).all)
    }

    fn counted(&self, kind: &Twins) -> Rows {
        let mut rows = Rows::default();
        // Answers that many pairs share are looked at once, and stay where they are meanwhile.
        let mut pairs: BTreeMap<*const Answer, (Rc<[Answer]>, usize)> = BTreeMap::new();
        self.each_pair(kind, |_, _, _, answers| {
            pairs.entry(answers.as_ptr()).or_insert((answers, 0)).1 += 1;
        });
        for (answers, pairs) in pairs.into_values() {
            for answer in answers.iter() {
                let count = prefixes(answer.ports) * pairs;
                rows.all += count;
                *rows.by_rule.entry(answer.rule).or_default() += count;
            }
        }
        rows
    }

    /// `db-1 (tag:db)`.
    fn name(&self, id: NodeId) -> String {
        let Some(node) = self.known.get(&id) else {
            return format!("node {id}");
        };
        let owner = match &node.owner {
            Owner::User(user) => match self.users.get(user) {
                Some(user) => user.name.to_string(),
                None => format!("user {user}"),
            },
            Owner::Tags(tags) => {
                let tags: Vec<&str> = tags.iter().map(Tag::as_str).collect();
                tags.join(", ")
            }
        };
        format!("{} ({owner})", node.name)
    }
}

/// Rows that a table of prefixes has for a range.
fn prefixes(range: PortRange) -> usize {
    let (mut at, end) = (u32::from(range.first), u32::from(range.last) + 1);
    let mut count = 0;
    while at < end {
        // The largest block that begins here and ends within.
        let aligned = at.trailing_zeros().min(16);
        at += 1 << aligned.min((end - at).ilog2());
        count += 1;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_as_many_prefixes_as_they_take() {
        let check = |first, last, count| assert_eq!(prefixes(PortRange { first, last }), count);
        check(0, 65535, 1);
        check(22, 22, 1);
        check(8000, 8099, 3);
        check(1, 65534, 30);
        check(0, 21, 3);
    }
}
