//! Who may stand where in `ssh`, and the policy's own `sshTests`.
//!
//! A tagged node belongs to nobody, so it may not log in where a person's files are; and a
//! person's own nodes are opened to that person alone.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use crate::node::NodeId;

use super::super::compile::CompiledPolicy;
use super::super::problem::{Complaints, Spanned};
use super::super::resolve::{Resolver, Subjects};
use super::super::selector::{self, Autogroup, Selector};
use super::super::ssh::SshRule;
use super::super::syntax::{Document, SshAction, SshClause, SshTest};
use super::Names;

pub(super) fn clause(names: &Names<'_>, clause: &SshClause, complaints: &mut Complaints) {
    for src in &clause.src {
        names.defined(src, complaints);
        let allowed = match &src.value {
            Selector::User(_)
            | Selector::Domain(_)
            | Selector::Group(_)
            | Selector::Idp(_)
            | Selector::Tag(_) => true,
            Selector::Autogroup(autogroup) => matches!(
                autogroup,
                Autogroup::Member | Autogroup::Tagged | Autogroup::Role(_) | Autogroup::Shared
            ),
            Selector::Any | Selector::Prefix(_) | Selector::Host(_) | Selector::IpSet(_) => false,
        };
        if !allowed {
            let message = format!(
                "alias not supported for SSH source: \"{}\"; use a user, a group, a tag, autogroup:member or autogroup:tagged",
                src.value
            );
            complaints.add(src.span, message);
        }
    }
    for dst in &clause.dst {
        destination(names, clause, dst, complaints);
    }
}

fn destination(
    names: &Names<'_>,
    clause: &SshClause,
    dst: &Spanned<Selector>,
    complaints: &mut Complaints,
) {
    let message = match &dst.value {
        Selector::Tag(_) | Selector::Autogroup(Autogroup::Tagged) => {
            names.defined(dst, complaints);
            return;
        }
        Selector::User(_) => {
            names.defined(dst, complaints);
            let alone = clause.src.iter().all(|src| src.value == dst.value);
            if alone && !clause.src.is_empty() {
                return;
            }
            format!(
                "user destination \"{}\" requires the source to be only that same user; use \"autogroup:self\"",
                dst.value
            )
        }
        Selector::Autogroup(Autogroup::Own | Autogroup::Member) => {
            let tagged = clause.src.iter().any(|src| {
                matches!(
                    src.value,
                    Selector::Tag(_) | Selector::Autogroup(Autogroup::Tagged)
                )
            });
            if !tagged {
                return;
            }
            format!(
                "tags in SSH source cannot access user-owned devices: dst \"{}\"",
                dst.value
            )
        }
        Selector::Any => "wildcard (*) is not supported as SSH destination; name a tag".to_owned(),
        _ => format!(
            "invalid dst \"{}\": alias not supported for SSH destination; use a tag, a user, autogroup:self or autogroup:tagged",
            dst.value
        ),
    };
    complaints.add(dst.span, message);
}

pub(super) fn run_tests(
    document: &Document,
    subjects: &Subjects<'_>,
    compiled: &CompiledPolicy,
    complaints: &mut Complaints,
) {
    let runner = Runner {
        document,
        resolver: Resolver::new(document, subjects.pools),
        subjects: *subjects,
        compiled,
        rules: RefCell::default(),
    };
    for test in &document.ssh_tests {
        runner.test(test, complaints);
    }
}

struct Runner<'a> {
    document: &'a Document,
    resolver: Resolver<'a>,
    subjects: Subjects<'a>,
    compiled: &'a CompiledPolicy,
    /// What was already worked out, by destination.
    rules: RefCell<BTreeMap<NodeId, Vec<SshRule>>>,
}

impl Runner<'_> {
    fn test(&self, test: &SshTest, complaints: &mut Complaints) {
        let asked = [&test.accept, &test.check, &test.deny];
        if asked.iter().all(|logins| logins.is_empty()) {
            complaints.add(
                test.span,
                "test(s) failed: this test asks nothing; give it \"accept\", \"check\" or \"deny\"",
            );
        }
        if test.dst.is_empty() {
            complaints.add(test.span, "test(s) failed: dst must be specified");
        }
        let sources = Selector::parse(&test.src.value).and_then(|src| self.nodes(&src));
        let sources = match sources {
            Ok(sources) => sources,
            Err(error) => {
                complaints.add(test.src.span, format!("test(s) failed: src: {error}"));
                return;
            }
        };
        for dst in &test.dst {
            match self.destinations(&dst.value) {
                Err(error) => complaints.add(dst.span, error),
                Ok(destinations) => {
                    let mut asked = false;
                    for source in &sources {
                        let own = destinations.iter().filter(|node| {
                            dst.value != "autogroup:self" || self.same_owner(*source, **node)
                        });
                        for node in own {
                            asked = true;
                            self.logins(test, *source, *node, complaints);
                        }
                    }
                    if !asked {
                        let message = "test(s) failed: dst: the sources own no node";
                        complaints.add(dst.span, message);
                    }
                }
            }
        }
    }

    fn logins(&self, test: &SshTest, source: NodeId, node: NodeId, complaints: &mut Complaints) {
        let mut rules = self.rules.borrow_mut();
        let rules = rules.entry(node).or_insert_with(|| self.compiled.ssh(node));
        let action = |login: &str| {
            let mut rules = rules.iter();
            let rule = rules.find(|rule| rule.matches(source, login));
            rule.map(|rule| rule.action)
        };
        let names = |id: NodeId| self.subjects.nodes[&id].name.to_string();
        let mut expect =
            |logins: &[Spanned<String>], what: &str, ok: fn(Option<SshAction>) -> bool| {
                for login in logins {
                    if !ok(action(&login.value)) {
                        let message = format!(
                            "test(s) failed: {} -> {}@{} is not {what}",
                            names(source),
                            login.value,
                            names(node)
                        );
                        complaints.add(login.span, message);
                    }
                }
            };
        expect(&test.accept, "accepted", |action| action.is_some());
        expect(&test.check, "checked", |action| {
            matches!(action, Some(SshAction::Check { .. }))
        });
        expect(&test.deny, "denied", |action| action.is_none());
    }

    fn same_owner(&self, one: NodeId, other: NodeId) -> bool {
        let owner = |id: NodeId| self.subjects.nodes.get(&id)?.owner.user();
        owner(one).is_some() && owner(one) == owner(other)
    }

    fn destinations(&self, text: &str) -> Result<Vec<NodeId>, String> {
        let disallowed = || format!("SSH tests dst contains disallowed element {text:?}");
        if text.starts_with("tag:") {
            let tag = selector::parse_tag(text)?;
            if !self.document.tag_owners.contains_key(&tag) {
                return Err(format!("SSH tests dst contains unknown tag {text:?}"));
            }
        }
        let selector = Selector::parse(text).map_err(|_| disallowed())?;
        let one_host = match &selector {
            Selector::Prefix(net) => net.prefix_len() == net.max_prefix_len(),
            Selector::Host(name) => self
                .document
                .hosts
                .get(name)
                .is_some_and(|host| host.value.prefix_len() == host.value.max_prefix_len()),
            Selector::Any
            | Selector::IpSet(_)
            | Selector::Autogroup(
                Autogroup::Internet | Autogroup::DangerAll | Autogroup::NonRoot,
            ) => false,
            _ => true,
        };
        if !one_host {
            return Err(disallowed());
        }
        self.nodes(&selector)
            .map_err(|error| format!("test(s) failed: dst: {error}"))
    }

    fn nodes(&self, selector: &Selector) -> Result<Vec<NodeId>, String> {
        let extent = self.resolver.extent(selector);
        // Rules tell nodes apart by their owners alone, so one of each stands for the others.
        let mut owners = BTreeSet::new();
        let nodes = self.subjects.nodes.values();
        let nodes = nodes.filter(|node| {
            let user = self.compiled.user_of(node);
            !node.expired && extent.covers(node, user, &self.compiled.ground)
        });
        let nodes: Vec<NodeId> = nodes
            .filter(|node| {
                owners.insert((node.owner.user(), node.owner.tags().collect::<Vec<_>>()))
            })
            .map(|node| node.id)
            .collect();
        match nodes.is_empty() {
            true => Err(format!("\"{selector}\" resolves to no node")),
            false => Ok(nodes),
        }
    }
}
