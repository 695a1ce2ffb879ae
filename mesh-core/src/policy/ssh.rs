//! SSH by mesh identity: which node may log in to which, as whom.
//!
//! Here a source is a node and not an address class: a session is rare, and the login that it may
//! have can depend on whose node it comes from (`localpart:*@DOMAIN`).

use std::collections::{BTreeMap, BTreeSet};

use super::compile::CompiledPolicy;
use super::resolve::{Extent, Resolver, Subjects};
use super::selector::{Autogroup, Selector};
use super::syntax::{Document, Login, SshAction, SshClause};
use crate::node::{NodeId, UserId};

/// What one rule lets some nodes do on another. Of several that match, the first counts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SshRule {
    pub action: SshAction,
    pub sources: BTreeSet<NodeId>,
    /// Accounts of the destination.
    pub logins: BTreeSet<String>,
    /// Any other account but root, too.
    pub any_but_root: bool,
    /// Environment variables that the session may bring, with `*` and `?`.
    pub accept_env: Vec<String>,
    /// Line of the policy file, from 1.
    pub line: u32,
}

impl SshRule {
    pub fn matches(&self, source: NodeId, login: &str) -> bool {
        let named = self.logins.contains(login) || (self.any_but_root && login != "root");
        named && self.sources.contains(&source)
    }
}

/// A clause with its nodes found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Compiled {
    clause: SshClause,
    line: u32,
    /// Sources by their owner; tagged ones under `None`.
    sources: BTreeMap<Option<UserId>, BTreeSet<NodeId>>,
    destinations: BTreeSet<NodeId>,
    /// Everybody's own nodes, too: `autogroup:self`.
    own: bool,
    /// The logins that `localpart:` gives a user.
    local_parts: BTreeMap<UserId, BTreeSet<String>>,
}

pub(super) fn compile(
    document: &Document,
    resolver: &Resolver<'_>,
    subjects: &Subjects<'_>,
) -> Vec<Compiled> {
    let one = |clause: &SshClause| {
        let line = document.lines.line(clause.span);
        Compiled::new(clause, line, resolver, subjects)
    };
    let mut compiled: Vec<Compiled> = document.ssh.iter().map(one).collect();
    // A check comes before an accept, wherever it stands; within each, the text's order.
    compiled.sort_by_key(|compiled| compiled.clause.action == SshAction::Accept);
    compiled
}

impl Compiled {
    fn new(
        clause: &SshClause,
        line: u32,
        resolver: &Resolver<'_>,
        subjects: &Subjects<'_>,
    ) -> Self {
        let src: Vec<Extent> = extents(resolver, clause.src.iter().map(|src| &src.value));
        let own = Selector::Autogroup(Autogroup::Own);
        let named = clause.dst.iter().map(|dst| &dst.value);
        let dst: Vec<Extent> = extents(resolver, named.filter(|dst| **dst != own));
        let mut sources: BTreeMap<Option<UserId>, BTreeSet<NodeId>> = BTreeMap::new();
        let mut destinations = BTreeSet::new();
        for node in subjects.nodes.values().filter(|node| !node.expired) {
            if src.iter().any(|extent| extent.covers(node)) {
                sources
                    .entry(node.owner.user())
                    .or_default()
                    .insert(node.id);
            }
            if dst.iter().any(|extent| extent.covers(node)) {
                destinations.insert(node.id);
            }
        }
        let mut local_parts: BTreeMap<UserId, BTreeSet<String>> = BTreeMap::new();
        for login in &clause.logins {
            let Login::LocalPart(wanted) = login else {
                continue;
            };
            for user in subjects.users.values() {
                if let Some((local, domain)) = user.name.as_str().rsplit_once('@')
                    && domain.eq_ignore_ascii_case(wanted)
                {
                    let logins = local_parts.entry(user.id).or_default();
                    logins.insert(local.to_owned());
                }
            }
        }
        Self {
            clause: clause.clone(),
            line,
            sources,
            destinations,
            own: clause.dst.iter().any(|dst| dst.value == own),
            local_parts,
        }
    }

    /// The rules that this clause comes to on one node.
    fn rules(&self, node: NodeId, owner: Option<UserId>) -> Vec<SshRule> {
        // A rule with `localpart:` also opens everybody's own nodes to himself: the hosted service
        // does so, and it gives nobody anything of another's.
        let own = owner.filter(|_| self.own || self.maps_local_parts());
        let mut rules = Vec::new();
        for (user, sources) in &self.sources {
            let mine = own.is_some() && *user == own;
            if !mine && !self.destinations.contains(&node) {
                continue;
            }
            let mut rule = SshRule {
                action: self.clause.action,
                sources: sources.clone(),
                logins: BTreeSet::new(),
                any_but_root: false,
                accept_env: self.clause.accept_env.clone(),
                line: self.line,
            };
            for login in &self.clause.logins {
                match login {
                    Login::Name(name) => drop(rule.logins.insert(name.clone())),
                    Login::NonRoot => rule.any_but_root = true,
                    Login::LocalPart(_) => {}
                }
            }
            if let Some(user) = user {
                let local_parts = self.local_parts.get(user).into_iter().flatten();
                rule.logins.extend(local_parts.cloned());
            }
            if rule.any_but_root || !rule.logins.is_empty() {
                rules.push(rule);
            }
        }
        rules
    }

    fn maps_local_parts(&self) -> bool {
        let mut logins = self.clause.logins.iter();
        logins.any(|login| matches!(login, Login::LocalPart(_)))
    }
}

fn extents<'a>(
    resolver: &Resolver<'_>,
    selectors: impl Iterator<Item = &'a Selector>,
) -> Vec<Extent> {
    selectors
        .map(|selector| resolver.extent(selector))
        .collect()
}

impl CompiledPolicy {
    /// Who may log in to a node, in the order in which rules are tried.
    pub fn ssh(&self, node: NodeId) -> Vec<SshRule> {
        let Some(placed) = self.nodes.get(&node) else {
            return Vec::new();
        };
        let owner = placed.owner;
        self.ssh
            .iter()
            .flat_map(|clause| clause.rules(node, owner))
            .collect()
    }

    /// The rule by which one node may log in to another, if any.
    pub fn ssh_login(&self, source: NodeId, node: NodeId, login: &str) -> Option<SshRule> {
        self.ssh(node)
            .into_iter()
            .find(|rule| rule.matches(source, login))
    }
}
