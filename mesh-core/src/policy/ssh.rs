//! SSH by mesh identity: which node may log in to which, as whom.
//!
//! Here a source is a node and not an address class: a session is rare, and the login that it may
//! have can depend on whose node it comes from (`localpart:*@DOMAIN`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use super::compile::CompiledPolicy;
use super::ground::Ground;
use super::resolve::{Extent, Resolver};
use super::selector::{Autogroup, Selector};
use super::syntax::{Document, Login, SshAction, SshClause};
use crate::node::{Node, NodeId, User, UserId};

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
        // Nobody is called nothing.
        let other = !login.is_empty() && login != "root";
        let named = self.logins.contains(login) || (self.any_but_root && other);
        named && self.sources.contains(&source)
    }
}

/// A clause with what its selectors mean.
#[derive(Clone, Debug)]
pub(super) struct Compiled {
    clause: Arc<SshClause>,
    line: u32,
    src: Arc<Vec<Extent>>,
    /// But for `autogroup:self`, which is `own`.
    dst: Arc<Vec<Extent>>,
    own: bool,
    /// Found when first asked for.
    sources: OnceLock<Arc<Sources>>,
}

/// Source nodes by their owner; tagged ones under `None`.
type Sources = BTreeMap<Option<UserId>, BTreeSet<NodeId>>;

pub(super) fn compile(document: &Document, resolver: &Resolver<'_>) -> Vec<Compiled> {
    let own = Selector::Autogroup(Autogroup::Own);
    let one = |clause: &SshClause| Compiled {
        clause: Arc::new(clause.clone()),
        line: document.lines.line(clause.span),
        src: Arc::new(resolver.extents(clause.src.iter())),
        dst: Arc::new(resolver.extents(clause.dst.iter().filter(|dst| dst.value != own))),
        own: clause.dst.iter().any(|dst| dst.value == own),
        sources: OnceLock::new(),
    };
    let mut compiled: Vec<Compiled> = document.ssh.iter().map(one).collect();
    // A check comes before an accept, wherever it stands; within each, the text's order.
    compiled.sort_by_key(|compiled| compiled.clause.action == SshAction::Accept);
    compiled
}

impl Compiled {
    /// Whether a node is one of the sources.
    pub(super) fn names(&self, node: &Node, user: Option<&User>, ground: &Ground) -> bool {
        let mut src = self.src.iter();
        src.any(|extent| extent.covers(node, user, ground))
    }

    /// The same, with the sources to be found again.
    pub(super) fn anew(&self) -> Self {
        Self {
            sources: OnceLock::new(),
            ..self.clone()
        }
    }

    fn sources(&self, policy: &CompiledPolicy) -> &Sources {
        self.sources.get_or_init(|| {
            let mut sources = Sources::new();
            for node in policy.known.values().filter(|node| !node.expired) {
                if self.names(node, policy.user_of(node), &policy.ground) {
                    let owned = sources.entry(node.owner.user()).or_default();
                    owned.insert(node.id);
                }
            }
            Arc::new(sources)
        })
    }

    /// The logins that `localpart:` gives a user.
    fn local_parts<'a>(&'a self, user: &'a User) -> impl Iterator<Item = String> + 'a {
        let parts = user.name.as_str().rsplit_once('@');
        self.clause.logins.iter().filter_map(move |login| {
            let (local, domain) = parts?;
            let Login::LocalPart(wanted) = login else {
                return None;
            };
            domain
                .eq_ignore_ascii_case(wanted)
                .then(|| local.to_owned())
        })
    }

    /// The rules that this clause comes to on one node.
    fn rules(&self, node: &Node, policy: &CompiledPolicy) -> Vec<SshRule> {
        // A rule with `localpart:` also opens everybody's own nodes to himself: the hosted service
        // does so, and it gives nobody anything of another's.
        let own = node.owner.user();
        let own = own.filter(|_| self.own || self.maps_local_parts());
        let user = policy.user_of(node);
        let mut dst = self.dst.iter();
        let named = dst.any(|extent| extent.covers(node, user, &policy.ground));
        let mut rules = Vec::new();
        if !named && own.is_none() {
            return rules;
        }
        for (user, sources) in self.sources(policy) {
            let mine = own.is_some() && *user == own;
            if !mine && !named {
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
            if let Some(user) = user.and_then(|user| policy.users.get(&user)) {
                rule.logins.extend(self.local_parts(user));
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

impl CompiledPolicy {
    /// Who may log in to a node, in the order in which rules are tried.
    pub fn ssh(&self, node: NodeId) -> Vec<SshRule> {
        let Some(node) = self.known.get(&node).filter(|node| !node.expired) else {
            return Vec::new();
        };
        self.ssh
            .iter()
            .flat_map(|clause| clause.rules(node, self))
            .collect()
    }

    /// The rule by which one node may log in to another, if any.
    pub fn ssh_login(&self, source: NodeId, node: NodeId, login: &str) -> Option<SshRule> {
        self.ssh(node)
            .into_iter()
            .find(|rule| rule.matches(source, login))
    }
}
