//! What one node is told: who stands behind which address, and what may be opened.
//!
//! Within one pair of identities the rules are resolved here, once: a deny beats every accept, and
//! of equal answers the first in the text gives its name. What comes out for a pair are disjoint
//! port ranges, so that whoever looks up needs no precedence at all.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use super::bits::Bits;
use super::classes::Class;
use super::compile::CompiledPolicy;
use super::kinds::Twins;
use super::rules::{Opening, Rule as RuleText, RuleSlot, Rules, Service};
use crate::netmap::{Action, Entry, EntryKey, NodePolicy, PortRange, Rule};
use crate::node::NodeId;
use crate::{Direction, RuleId};

/// The answer for a stretch of ports of one protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Answer {
    pub(super) protocol: u8,
    pub(super) ports: PortRange,
    pub(super) action: Action,
    pub(super) rule: RuleSlot,
}

/// Entries, and the rules that they name. Where in the text those stand is not kept here: it
/// changes with every line before them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Loaded {
    entries: BTreeMap<EntryKey, Entry>,
    rules: BTreeMap<RuleId, RuleSlot>,
}

/// Answers that were found before: many pairs of classes are joined by the very same rules.
#[derive(Debug, Default)]
pub(super) struct Known(BTreeMap<Vec<(RuleSlot, usize)>, Rc<[Answer]>>);

impl Rules {
    /// What those of the one class may, and may not, open to those of the other: disjoint, denies
    /// included, by protocol and port.
    pub(super) fn answers(&self, src: &Class, dst: &Class) -> Vec<Answer> {
        let answers = self.answers_among(src, dst, &mut Known::default());
        answers.to_vec()
    }

    pub(super) fn answers_among(
        &self,
        src: &Class,
        dst: &Class,
        known: &mut Known,
    ) -> Rc<[Answer]> {
        let joined: Vec<_> = self.between(src, dst).collect();
        let openings = joined.iter().flat_map(|(slot, _, openings)| {
            let services = openings.iter().map(|opening| &opening.services);
            services.map(|services| (*slot, services.as_ptr() as usize))
        });
        let answers = known.0.entry(openings.collect());
        Rc::clone(answers.or_insert_with(|| resolve(&joined)))
    }

    /// Whether anything at all is granted: a packet, or a capability.
    pub(super) fn opens(&self, src: &Class, dst: &Class) -> bool {
        self.opens_among(src, dst, &mut Known::default())
    }

    pub(super) fn opens_among(&self, src: &Class, dst: &Class, known: &mut Known) -> bool {
        let mut accepts = false;
        let mut denies = false;
        for slot in src.src_rules.both(&dst.dst_rules) {
            let rule = &self.all[slot];
            if !rule.joins(&src.key, &dst.key) {
                continue;
            }
            match rule.action {
                Action::Accept if !rule.apps.is_empty() => return true,
                Action::Accept if self.denies.is_empty() => return true,
                Action::Accept => accepts = true,
                Action::Deny => denies = true,
            }
        }
        let mut left = || {
            let answers = self.answers_among(src, dst, known);
            answers.iter().any(|answer| answer.action == Action::Accept)
        };
        accepts && (!denies || left())
    }
}

/// Denies first, so that what they hold is theirs; then in the order of the text.
fn resolve(joined: &[(RuleSlot, &RuleText, Vec<&Opening>)]) -> Rc<[Answer]> {
    let mut resolved: BTreeMap<u8, Resolved> = BTreeMap::new();
    for action in [Action::Deny, Action::Accept] {
        let rules = joined.iter().filter(|(_, rule, _)| rule.action == action);
        for (slot, _, openings) in rules {
            let services = openings.iter().flat_map(|opening| opening.services.iter());
            for Service { protocol, ports } in services {
                let resolved = resolved.entry(*protocol).or_default();
                resolved.fill(*ports, action, *slot);
            }
        }
    }
    let answers = resolved.into_iter();
    answers
        .flat_map(|(protocol, resolved)| resolved.answers(protocol))
        .collect()
}

impl CompiledPolicy {
    /// The part of the policy that concerns one node; empty for one that is unknown or expired.
    pub fn node(&self, id: NodeId) -> NodePolicy {
        let Some(me) = self.nodes.get(&id) else {
            return NodePolicy::default();
        };
        let kind = &self.kinds[me.kind];
        let Loaded { entries, rules } = kind
            .loaded
            .get_or_init(|| Arc::new(self.load(kind)))
            .as_ref();
        let table = self.table(id).into_iter();
        let identities = table.map(|(net, class)| (net, self.classes[class].identity));
        let rules = rules.iter();
        NodePolicy {
            identities: identities.collect(),
            entries: entries.clone(),
            rules: rules
                .map(|(id, slot)| (*id, self.rules.shown(*slot)))
                .collect(),
        }
    }

    fn load(&self, kind: &Twins) -> Loaded {
        // Put in order at once: a tree that grows entry by entry takes several times as long.
        let mut entries = Vec::new();
        let mut rules = BTreeMap::new();
        self.each_pair(kind, |remote, local, direction, answers| {
            for answer in answers.iter() {
                let rule = self.rules.all[answer.rule].id;
                let key = EntryKey {
                    remote: remote.identity,
                    local: local.identity,
                    direction,
                    proto: Some(answer.protocol),
                    ports: answer.ports,
                };
                let entry = Entry {
                    action: answer.action,
                    rule,
                };
                entries.push((key, entry));
                rules.insert(rule, answer.rule);
            }
        });
        Loaded {
            entries: entries.into_iter().collect(),
            rules,
        }
    }

    /// What stands between each class that a kind has to do with and each of its own: remote, local.
    pub(super) fn each_pair<'a>(
        &'a self,
        kind: &Twins,
        mut told: impl FnMut(&'a Class, &'a Class, Direction, Rc<[Answer]>),
    ) {
        let mut known = Known::default();
        // All classes of the peers, also those that everything is denied to, for a verdict names
        // its rule; its own, for two routers may stand before one subnet; and the world.
        let peers = self.kinds.iter().filter(|other| kind.sees(other));
        let theirs = peers.flat_map(|peer| &peer.classes).chain(&kind.classes);
        let world = self.world.iter().map(|(_, class)| class);
        let remote: Bits = theirs.chain(world).copied().collect();
        for local in &kind.classes {
            for remote in remote.iter() {
                let (local, remote) = (&self.classes[*local], &self.classes[remote]);
                let into = self.rules.answers_among(remote, local, &mut known);
                told(remote, local, Direction::Ingress, into);
                let out = self.rules.answers_among(local, remote, &mut known);
                told(remote, local, Direction::Egress, out);
            }
        }
    }

    /// Text and line of a rule, if the policy has it.
    pub fn rule(&self, id: RuleId) -> Option<Rule> {
        let (slot, _) = self.rules.slots().find(|(_, rule)| rule.id == id)?;
        Some(self.rules.shown(slot))
    }
}

/// Disjoint ranges of one protocol's ports, by their first port; who comes first keeps his place.
#[derive(Default)]
struct Resolved(BTreeMap<u16, (u16, Action, usize)>);

impl Resolved {
    fn fill(&mut self, ports: PortRange, action: Action, rule: usize) {
        let mut gaps = Vec::new();
        let mut at = u32::from(ports.first);
        let before = self.0.range(..=ports.first).next_back();
        if let Some((_, (end, ..))) = before {
            at = at.max(u32::from(*end) + 1);
        }
        for (&start, &(end, ..)) in self.0.range(ports.first..=ports.last) {
            if u32::from(start) > at {
                gaps.push((at, u32::from(start) - 1));
            }
            at = at.max(u32::from(end) + 1);
        }
        if at <= u32::from(ports.last) {
            gaps.push((at, u32::from(ports.last)));
        }
        for (first, last) in gaps {
            let port = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
            self.0.insert(port(first), (port(last), action, rule));
        }
    }

    /// Ascending, neighbours with the same answer joined.
    fn answers(self, protocol: u8) -> Vec<Answer> {
        let mut answers: Vec<Answer> = Vec::new();
        for (first, (last, action, rule)) in self.0 {
            if let Some(previous) = answers.last_mut()
                && (previous.action, previous.rule) == (action, rule)
                && previous.ports.last.checked_add(1) == Some(first)
            {
                previous.ports.last = last;
                continue;
            }
            let ports = PortRange { first, last };
            answers.push(Answer {
                protocol,
                ports,
                action,
                rule,
            });
        }
        answers
    }
}
