//! What one node is told: who stands behind which address, and what may be opened.
//!
//! Within one pair of identities the rules are resolved here, once: a deny beats every accept, and
//! of equal answers the first in the text gives its name. What comes out for a pair are disjoint
//! port ranges, so that whoever looks up needs no precedence at all.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::compile::{Class, CompiledPolicy, Service};
use super::resolve::Subjects;
use crate::netmap::{Action, Entry, EntryKey, NodePolicy, PortRange};
use crate::node::NodeId;
use crate::{Direction, RuleId};

/// The answer for a stretch of ports of one protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Answer {
    pub(super) protocol: u8,
    pub(super) ports: PortRange,
    pub(super) action: Action,
    /// Index into [`CompiledPolicy::rules`].
    pub(super) rule: usize,
}

impl CompiledPolicy {
    /// The terms by which an address of class `src` may, or may not, open to one of class `dst`.
    pub(super) fn terms_between<'a>(
        &'a self,
        src: &'a Class,
        dst: &'a Class,
    ) -> impl Iterator<Item = usize> + 'a {
        let one_owner = src.owner.is_some() && src.owner == dst.owner;
        src.src_terms
            .both(&dst.dst_terms)
            .filter(move |&term| one_owner || !self.terms[term].same_owner)
    }

    /// The same for two addresses, whoever has them.
    pub(super) fn answers_between(
        &self,
        subjects: &Subjects<'_>,
        src: IpAddr,
        dst: IpAddr,
    ) -> Vec<Answer> {
        self.answers(&self.class_of(subjects, src), &self.class_of(subjects, dst))
    }

    /// What those terms come to: disjoint, denies included, by protocol and port.
    pub(super) fn answers(&self, src: &Class, dst: &Class) -> Vec<Answer> {
        let mut resolved: BTreeMap<u8, Resolved> = BTreeMap::new();
        let terms: Vec<usize> = self.terms_between(src, dst).collect();
        for action in [Action::Deny, Action::Accept] {
            for term in terms.iter().map(|&term| &self.terms[term]) {
                if term.action != action {
                    continue;
                }
                for Service { protocol, ports } in term.services.iter() {
                    let resolved = resolved.entry(*protocol).or_default();
                    resolved.fill(*ports, action, term.rule);
                }
            }
        }
        resolved
            .into_iter()
            .flat_map(|(protocol, resolved)| resolved.answers(protocol))
            .collect()
    }

    /// The part of the policy that concerns one node; empty for one that is unknown or expired.
    pub fn node(&self, id: NodeId) -> NodePolicy {
        let mut policy = NodePolicy::default();
        let Some(me) = self.nodes.get(&id) else {
            return policy;
        };
        let mut local = BTreeSet::new();
        let mut remote = BTreeSet::new();
        for (net, class) in me.places() {
            policy.identities.insert(net, self.classes[class].identity);
            local.insert(class);
        }
        for (net, class) in self.remote_places(id) {
            let identity = self.classes[class].identity;
            policy.identities.entry(net).or_insert(identity);
            remote.insert(class);
        }
        for (net, class) in self.world {
            let class = &self.classes[class];
            for &mine in &local {
                self.entries(class, &self.classes[mine], Direction::Ingress, &mut policy);
            }
            let known = policy
                .entries
                .keys()
                .any(|key| key.remote == class.identity);
            if known {
                policy.identities.entry(net).or_insert(class.identity);
            }
        }
        for &mine in &local {
            for &theirs in &remote {
                let (theirs, mine) = (&self.classes[theirs], &self.classes[mine]);
                self.entries(theirs, mine, Direction::Ingress, &mut policy);
                self.entries(theirs, mine, Direction::Egress, &mut policy);
            }
        }
        policy
    }

    fn entries(
        &self,
        remote: &Class,
        local: &Class,
        direction: Direction,
        policy: &mut NodePolicy,
    ) {
        let answers = match direction {
            Direction::Ingress => self.answers(remote, local),
            Direction::Egress => self.answers(local, remote),
        };
        for answer in answers {
            let (id, rule) = &self.rules[answer.rule];
            let key = EntryKey {
                remote: remote.identity,
                local: local.identity,
                direction,
                proto: Some(answer.protocol),
                ports: answer.ports,
            };
            let entry = Entry {
                action: answer.action,
                rule: *id,
            };
            policy.entries.insert(key, entry);
            policy.rules.entry(*id).or_insert_with(|| rule.clone());
        }
    }

    /// Text and line of a rule, if the policy has it.
    pub fn rule(&self, id: RuleId) -> Option<&crate::netmap::Rule> {
        self.rules
            .iter()
            .find(|(known, _)| *known == id)
            .map(|(_, rule)| rule)
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
