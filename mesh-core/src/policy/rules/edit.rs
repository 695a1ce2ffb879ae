//! What a new text says otherwise than the last one.
//!
//! Rules are told apart by their text and their order, never by their lines: what is said in the
//! same words and the same order is the same rule, and keeps everything that hangs on it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{Opening, Rule, RuleSlot, Rules, Service, Spot};
use crate::RuleId;
use crate::netmap::{Action, PortRange};
use crate::node::Tag;
use crate::policy::atoms::{AtomId, Atoms};
use crate::policy::bits::Bits;
use crate::policy::identity;
use crate::policy::ports::{self, Ports, Protocol};
use crate::policy::problem::Span;
use crate::policy::resolve::{Extent, POSTURE, Resolver};
use crate::policy::selector::{Autogroup, Selector};
use crate::policy::syntax::{Clause, Document, Icmp, Kind, Services};
use crate::world::Pools;

/// What a new text changed, for those who live under it.
#[derive(Debug, Default)]
pub(in crate::policy) struct Edit {
    /// Selectors of rules that came or went: whoever satisfies one is judged anew.
    pub(in crate::policy) judged: Bits,
    /// A rule about every destination came or went.
    pub(in crate::policy) everybody: bool,
    /// Selectors that came, went or mean something else: what they meant, and what they mean.
    pub(in crate::policy) meanings: Vec<(Option<Extent>, Option<Extent>)>,
}

impl Edit {
    fn judge(&mut self, rule: &Rule) {
        self.everybody |= rule.is_everywhere();
        for atom in rule.atoms() {
            self.judged.insert(atom);
        }
    }
}

impl Rules {
    /// Whether this is what was read last.
    pub(in crate::policy) fn are_of(&self, document: &Document) -> bool {
        Arc::ptr_eq(&self.text, &document.text) && self.file == document.file
    }

    /// Takes over what a new text says otherwise than the last one.
    pub(in crate::policy) fn read(
        &mut self,
        document: &Document,
        resolver: &Resolver<'_>,
        atoms: &mut Arc<Atoms>,
        pools: &Pools,
    ) -> Edit {
        let mut edit = Edit::default();
        let implied = document.unrestricted.then(Clause::allow_all);
        let clauses: Vec<&Clause> = implied.iter().chain(&document.clauses).collect();
        let postures = document.default_posture.iter();
        let postures: Vec<String> = postures.map(|name| name.value.clone()).collect();
        // Both are part of what every rule says.
        let same = self.icmp == document.icmp && self.default_posture == postures;
        let kept = match same {
            true => self.align(&clauses, &document.text),
            false => vec![None; clauses.len()],
        };
        self.icmp = document.icmp;
        self.default_posture = postures;
        let mut order = Vec::with_capacity(clauses.len());
        for (clause, kept) in clauses.iter().zip(kept) {
            let slot = kept.unwrap_or_else(|| {
                let rule = self.rule(clause, resolver, atoms, pools, &mut edit);
                edit.judge(&rule);
                self.insert(rule)
            });
            order.push(slot);
        }
        let stays: Bits = order.iter().copied().collect();
        let old = std::mem::replace(&mut self.order, order);
        for slot in old.into_iter().filter(|slot| !stays.contains(*slot)) {
            self.retire(slot, atoms, &mut edit);
        }
        for (position, (slot, clause)) in self.order.iter().zip(&clauses).enumerate() {
            if self.spots.len() <= *slot {
                self.spots.resize(*slot + 1, Spot::default());
            }
            self.spots[*slot] = Spot {
                kind: Some(clause.kind),
                position,
                span: clause.span,
                line: document.lines.line(clause.span),
            };
        }
        self.text = Arc::clone(&document.text);
        self.file = Arc::clone(&document.file);
        self.name(&mut edit);
        for atom in atoms.iter().collect::<Vec<_>>() {
            let Some(extent) = resolver.defined(atoms.text(atom)) else {
                continue;
            };
            if extent != *atoms.extent(atom) {
                let old = Arc::make_mut(atoms).redefine(atom, extent.clone());
                edit.meanings.push((old, Some(extent)));
            }
        }
        edit
    }

    /// For each clause of a new text, the rule that said the same, in the same order, before.
    fn align(&self, clauses: &[&Clause], text: &str) -> Vec<Option<RuleSlot>> {
        let said = |slot: RuleSlot| {
            let spot = &self.spots[slot];
            (spot.kind, excerpt(&self.text, spot.span))
        };
        let says = |clause: &Clause| (Some(clause.kind), excerpt(text, clause.span));
        let same = |(clause, slot): &(&&Clause, &RuleSlot)| says(clause) == said(**slot);
        let head = clauses.iter().zip(&self.order).take_while(same).count();
        let (new, old) = (&clauses[head..], &self.order[head..]);
        let ends = new.iter().rev().zip(old.iter().rev());
        let tail = ends.take_while(same).count();
        let (new, tail_of_new) = new.split_at(new.len() - tail);
        let (old, tail_of_old) = old.split_at(old.len() - tail);
        let mut places: BTreeMap<(Option<Kind>, &str), Vec<usize>> = BTreeMap::new();
        for (place, slot) in old.iter().enumerate().rev() {
            places.entry(said(*slot)).or_default().push(place);
        }
        let found: Vec<Option<usize>> = new
            .iter()
            .map(|clause| places.get_mut(&says(clause))?.pop())
            .collect();
        let ascending = ascending(&found);
        let head = self.order[..head].iter().map(|slot| Some(*slot));
        let middle = ascending.iter().map(|place| place.map(|place| old[place]));
        let tail = tail_of_old.iter().map(|slot| Some(*slot));
        debug_assert_eq!(tail_of_new.len(), tail_of_old.len());
        head.chain(middle).chain(tail).collect()
    }

    fn rule(
        &self,
        clause: &Clause,
        resolver: &Resolver<'_>,
        atoms: &mut Arc<Atoms>,
        pools: &Pools,
        edit: &mut Edit,
    ) -> Rule {
        let mut atom = |text: &str, extent: &dyn Fn() -> Extent| {
            atoms.id(text).unwrap_or_else(|| {
                let extent = extent();
                edit.meanings.push((None, Some(extent.clone())));
                Arc::make_mut(atoms).insert(text, extent)
            })
        };
        let src = clause.src.iter().map(|src| &src.value);
        let src = src.map(|src| atom(&src.to_string(), &|| resolver.extent(src)));
        let src = src.collect();
        let via = clause.via.iter().map(|tag| &tag.value);
        let via = via.map(|tag| atom(&via_text(tag), &|| Extent::Behind(tag.clone())));
        let via = via.collect();
        // To be denied takes no posture.
        let own = clause.posture.as_ref();
        let own = own.map(|names| names.iter().map(|name| name.value.as_str()).collect());
        let postures: Vec<&str> = match clause.kind {
            Kind::Deny => Vec::new(),
            Kind::Acl | Kind::Grant => own.unwrap_or_else(|| {
                let default = self.default_posture.iter();
                default.map(String::as_str).collect()
            }),
        };
        let postures = postures.into_iter();
        let postures =
            postures.map(|name| atom(&format!("{POSTURE}{name}"), &|| resolver.posture(name)));
        let postures = postures.collect();
        let action = match clause.kind {
            Kind::Deny => Action::Deny,
            Kind::Acl | Kind::Grant => Action::Accept,
        };
        let mut by_dst: BTreeMap<AtomId, Vec<Opening>> = BTreeMap::new();
        let mut everywhere = Vec::new();
        // The items of a grant are the same for all of its destinations.
        let mut last: Option<(&Services, Arc<[Service]>)> = None;
        for target in &clause.dst {
            let items = &target.value.services;
            let services = match last.take() {
                Some((before, same)) if Arc::ptr_eq(before, items) => same,
                _ => services(items, action, self.icmp).into(),
            };
            last = Some((items, Arc::clone(&services)));
            let selector = &target.value.selector;
            let opening = Opening {
                services,
                same_owner: *selector == Selector::Autogroup(Autogroup::Own),
            };
            if *selector == Selector::Any {
                everywhere.push(opening);
            } else {
                let dst = atom(&selector.to_string(), &|| resolver.extent(selector));
                by_dst.entry(dst).or_default().push(opening);
            }
        }
        Rule {
            id: UNNAMED,
            action,
            apps: clause.apps(),
            src,
            postures,
            via,
            names_icmp: clause
                .dst
                .iter()
                .any(|target| names_icmp(&target.value.services)),
            by_dst,
            everywhere,
            kind: clause.kind,
            content: clause.content().into(),
            occurrence: 0,
            wanted: 0,
            summary: clause.summary(pools),
        }
    }

    fn insert(&mut self, rule: Rule) -> RuleSlot {
        let rule = Arc::new(rule);
        let slot = self.all.insert(Arc::clone(&rule));
        for atom in rule.atoms() {
            if self.uses.len() <= atom {
                self.uses.resize(atom + 1, 0);
                self.sources.resize(atom + 1, Bits::default());
                self.destinations.resize(atom + 1, Bits::default());
            }
            self.uses[atom] += 1;
        }
        for atom in &rule.src {
            self.sources[*atom].insert(slot);
        }
        for atom in rule.dst() {
            self.destinations[atom].insert(slot);
        }
        for (listed, list) in self.lists(&rule) {
            if listed {
                list.insert(slot);
            }
        }
        let content = Arc::clone(&rule.content);
        self.said.entry(content).or_default().push(slot);
        self.unnamed.insert(Arc::clone(&rule.content));
        slot
    }

    fn retire(&mut self, slot: RuleSlot, atoms: &mut Arc<Atoms>, edit: &mut Edit) {
        let Some(rule) = self.all.remove(slot) else {
            return;
        };
        edit.judge(&rule);
        for atom in &rule.src {
            self.sources[*atom].remove(slot);
        }
        for atom in rule.dst() {
            self.destinations[atom].remove(slot);
        }
        for (listed, list) in self.lists(&rule) {
            if listed {
                list.remove(slot);
            }
        }
        for atom in rule.atoms() {
            self.uses[atom] -= 1;
            if self.uses[atom] == 0 {
                let old = Arc::make_mut(atoms).remove(atom);
                edit.meanings.push((old, None));
            }
        }
        self.numbers.remove(rule.wanted);
        if let Some(same) = self.said.get_mut(&rule.content) {
            same.retain(|known| *known != slot);
            if same.is_empty() {
                self.said.remove(&rule.content);
            }
        }
    }

    /// The lists that a rule may stand in, and whether it does.
    fn lists(&mut self, rule: &Rule) -> [(bool, &mut Bits); 5] {
        [
            (rule.is_everywhere(), &mut self.everywhere),
            (!rule.postures.is_empty(), &mut self.postured),
            (!rule.via.is_empty(), &mut self.steered),
            (rule.is_selfish(), &mut self.selfish),
            (rule.action == Action::Deny, &mut self.denies),
        ]
    }

    /// Numbers the rules: by the hash of what one says and of how often it was said before.
    fn name(&mut self, edit: &mut Edit) {
        let clashed = self.numbers.clash();
        let mut named: Vec<(RuleSlot, usize)> = Vec::new();
        for content in &self.unnamed {
            let Some(slots) = self.said.get_mut(content) else {
                continue;
            };
            slots.sort_by_key(|slot| self.spots[*slot].position);
            for (occurrence, slot) in slots.iter().enumerate() {
                let rule = &self.all[*slot];
                if rule.id == UNNAMED || rule.occurrence != occurrence {
                    named.push((*slot, occurrence));
                }
            }
        }
        // What is said several times is looked at again: the order of those may change.
        let several = |content: &Arc<str>| {
            let slots = self.said.get(content);
            slots.is_some_and(|slots| slots.len() > 1)
        };
        self.unnamed.retain(several);
        for (slot, occurrence) in named {
            let mut rule = Rule::clone(&self.all[slot]);
            if rule.id != UNNAMED {
                self.numbers.remove(rule.wanted);
            }
            rule.occurrence = occurrence;
            rule.wanted = identity::wanted_by_rule(&rule.content, occurrence);
            self.numbers.add(rule.wanted);
            self.rename(slot, rule.wanted, rule, edit);
        }
        if clashed || self.numbers.clash() {
            let mut wanted: Vec<_> = self
                .all
                .iter()
                .map(|(slot, rule)| {
                    (
                        (Arc::clone(&rule.content), rule.occurrence),
                        rule.wanted,
                        slot,
                    )
                })
                .collect();
            wanted.sort();
            let numbers = identity::settle(wanted.iter().map(|(_, wanted, _)| *wanted), 1);
            for ((_, _, slot), number) in wanted.into_iter().zip(numbers) {
                let rule = Rule::clone(&self.all[slot]);
                self.rename(slot, number, rule, edit);
            }
        }
    }

    fn rename(&mut self, slot: RuleSlot, number: u32, mut rule: Rule, edit: &mut Edit) {
        if rule.id != RuleId(number) {
            rule.id = RuleId(number);
            edit.judge(&rule);
        }
        if let Some(known) = self.all.get_mut(slot) {
            *known = Arc::new(rule);
        }
    }
}

/// No rule's number.
const UNNAMED: RuleId = RuleId(0);

fn excerpt(text: &str, span: Span) -> &str {
    text.get(span.start as usize..span.end as usize)
        .unwrap_or_default()
}

/// The longest ascending choice among the numbers; the others become nothing.
fn ascending(numbers: &[Option<usize>]) -> Vec<Option<usize>> {
    // For each length, where the choice of that length with the least end ends.
    let mut ends: Vec<usize> = Vec::new();
    let mut before: Vec<Option<usize>> = vec![None; numbers.len()];
    for (at, number) in numbers.iter().enumerate() {
        if number.is_none() {
            continue;
        }
        let length = ends.partition_point(|end| numbers[*end] < *number);
        before[at] = length.checked_sub(1).map(|shorter| ends[shorter]);
        match ends.get_mut(length) {
            Some(end) => *end = at,
            None => ends.push(at),
        }
    }
    let mut chosen = vec![None; numbers.len()];
    let mut at = ends.last().copied();
    while let Some(place) = at {
        chosen[place] = numbers[place];
        at = before[place];
    }
    chosen
}

/// What tells the prefixes behind a router from the same prefixes behind another.
fn via_text(tag: &Tag) -> String {
    format!("via:{tag}")
}

/// ICMP type of an echo request: RFC 792 and RFC 4443, section 4.1.
const ECHO: [(u8, u16); 2] = [(ports::ICMP, 8), (ports::ICMPV6, 128)];

fn names_icmp(items: &Services) -> bool {
    let mut protocols = items.iter().filter_map(|(protocol, _)| *protocol);
    protocols.any(|protocol| protocol == ports::ICMP || protocol == ports::ICMPV6)
}

/// Protocol by protocol, what the items of a rule are about.
pub(in crate::policy) fn services(
    items: &[(Protocol, Ports)],
    action: Action,
    icmp: Icmp,
) -> Vec<Service> {
    let mut services = BTreeSet::new();
    for (protocol, ports) in items {
        match protocol {
            Some(protocol) => {
                services.extend(ports.ranges().iter().map(|&ports| Service {
                    protocol: *protocol,
                    ports,
                }));
            }
            None => {
                for protocol in ports::DEFAULT_PROTOCOLS {
                    let portless = !ports::has_ports(Some(protocol));
                    // To deny a port says nothing of protocols that have none.
                    if portless && action == Action::Deny && !ports.is_all() {
                        continue;
                    }
                    let ranges = if portless {
                        &[PortRange::ALL]
                    } else {
                        ports.ranges()
                    };
                    services.extend(ranges.iter().map(|&ports| Service { protocol, ports }));
                }
            }
        }
    }
    if action == Action::Accept && icmp == Icmp::AnyRule && !services.is_empty() {
        services.extend(ECHO.map(|(protocol, kind)| Service {
            protocol,
            ports: PortRange {
                first: kind,
                last: kind,
            },
        }));
    }
    services.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_ascending_choice_is_kept() {
        let check = |numbers: &[usize], expected: &[usize]| {
            let numbers: Vec<Option<usize>> = numbers.iter().copied().map(Some).collect();
            let chosen: Vec<usize> = ascending(&numbers).into_iter().flatten().collect();
            assert_eq!(chosen, expected);
        };
        check(&[], &[]);
        check(&[0, 1, 2], &[0, 1, 2]);
        check(&[5, 0, 1, 2], &[0, 1, 2]);
        check(&[1, 2, 3, 0], &[1, 2, 3]);
        check(&[2, 0, 3, 1, 4], &[0, 1, 4]);
        assert_eq!(ascending(&[None, Some(3), None]), [None, Some(3), None]);
    }
}
