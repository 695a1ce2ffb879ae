//! The policy text as typed sections.
//!
//! Nothing here knows who exists: that a name is defined, and that a rule makes sense, is the
//! business of [`super::check`].

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;

use super::hujson::{self, Node};
use super::problem::{self, Complaints, Lines, Problems, Span, Spanned};
use super::selector::{self, Selector};
use crate::node::Tag;

mod decode;
mod rules;
mod sections;
mod ssh;
mod summary;
mod tests_block;

pub(super) use rules::{Clause, Kind, Services};
pub(super) use sections::{AutoApprovers, NodeAttributes, SetStep};
pub use ssh::SshAction;
pub(super) use ssh::{Login, SshClause, SshTest};
pub(super) use tests_block::Test;

use decode::Fields;

/// A policy text that is well-formed. [`super::check`] says whether it also makes sense.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Document {
    pub(super) text: Arc<str>,
    pub(super) file: Arc<str>,
    pub(super) lines: Lines,
    pub(super) groups: BTreeMap<String, Spanned<Vec<Spanned<Selector>>>>,
    pub(super) hosts: BTreeMap<String, Spanned<IpNet>>,
    pub(super) tag_owners: BTreeMap<Tag, Spanned<Vec<Spanned<Selector>>>>,
    /// Of `grants`, `acls` and `denies`, in the order of the text.
    pub(super) clauses: Vec<Clause>,
    /// Neither `acls` nor `grants` stands in the text: everything is allowed.
    pub(super) unrestricted: bool,
    pub(super) ip_sets: sections::IpSets,
    pub(super) postures: sections::Postures,
    /// `defaultSrcPosture`, of which any one is enough.
    pub(super) default_posture: Vec<Spanned<String>>,
    pub(super) node_attributes: Vec<NodeAttributes>,
    pub(super) auto_approvers: AutoApprovers,
    pub(super) ssh: Vec<SshClause>,
    pub(super) ssh_tests: Vec<SshTest>,
    pub(super) tests: Vec<Test>,
    pub(super) icmp: Icmp,
    /// `randomizeClientPort`: agents choose their WireGuard port at random.
    pub randomize_client_port: bool,
    pub(super) randomize_span: Span,
}

/// Which rules let an ICMP echo pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Icmp {
    /// Any rule that joins the two addresses, as the reference.
    #[default]
    AnyRule,
    /// Only rules that are about ICMP.
    Strict,
}

const SECTIONS: [&str; 16] = [
    "groups",
    "hosts",
    "tagOwners",
    "acls",
    "grants",
    "denies",
    "ipsets",
    "postures",
    "defaultSrcPosture",
    "nodeAttrs",
    "autoApprovers",
    "ssh",
    "tests",
    "sshTests",
    "randomizeClientPort",
    "options",
];

/// Sections of the hosted service that are accepted and do nothing here; [`super::idle`] says so.
const IDLE: [&str; 3] = ["derpMap", "disableIPv4", "OneCGNATRoute"];

impl Document {
    /// Reads HuJSON of at most [`super::MAX_SIZE`] bytes. Empty text is a policy without rules.
    pub fn parse(text: &str) -> Result<Self, Problems> {
        let mut complaints = Complaints::default();
        let mut document = Self {
            unrestricted: true,
            file: problem::UNNAMED.into(),
            ..Self::default()
        };
        match hujson::parse(text) {
            Ok(Some(node)) => document.sections(&node, &mut complaints),
            Ok(None) => {}
            Err(malformed) => complaints.add(malformed.span, malformed.message),
        }
        complaints.settle(text)?;
        document.lines = Lines::of(text);
        document.text = text.into();
        Ok(document)
    }

    /// The same text under the name that rules and problems are to be found by.
    #[must_use]
    pub fn in_file(self, name: &str) -> Self {
        Self {
            file: name.into(),
            ..self
        }
    }

    pub fn file(&self) -> &str {
        &self.file
    }

    /// The text that was read.
    pub fn text(&self) -> &str {
        &self.text
    }

    fn sections(&mut self, node: &Node, complaints: &mut Complaints) {
        let Some(mut fields) = Fields::of(node, "a policy", complaints) else {
            return;
        };
        if let Some(node) = fields.take("groups", complaints) {
            self.groups = groups(node, complaints);
        }
        if let Some(node) = fields.take("hosts", complaints) {
            self.hosts = hosts(node, complaints);
        }
        if let Some(node) = fields.take("tagOwners", complaints) {
            self.tag_owners = tag_owners(node, complaints);
        }
        if let Some(node) = fields.take("acls", complaints) {
            self.unrestricted = false;
            self.clauses.extend(rules::acls(node, complaints));
        }
        if let Some(node) = fields.take("grants", complaints) {
            self.unrestricted = false;
            self.clauses.extend(rules::grants(node, complaints));
        }
        if let Some(node) = fields.take("denies", complaints) {
            self.clauses.extend(rules::denies(node, complaints));
        }
        self.clauses.sort_by_key(|clause| clause.span);
        if let Some(node) = fields.take("ipsets", complaints) {
            self.ip_sets = sections::ip_sets(node, complaints);
        }
        if let Some(node) = fields.take("postures", complaints) {
            self.postures = sections::postures(node, complaints);
        }
        let postures = fields.take("defaultSrcPosture", complaints);
        self.default_posture = decode::parsed(
            postures,
            "\"defaultSrcPosture\"",
            complaints,
            sections::posture_name,
        );
        if let Some(node) = fields.take("nodeAttrs", complaints) {
            self.node_attributes = sections::node_attributes(node, complaints);
        }
        if let Some(node) = fields.take("autoApprovers", complaints) {
            self.auto_approvers = sections::auto_approvers(node, complaints);
        }
        if let Some(node) = fields.take("ssh", complaints) {
            self.ssh = ssh::rules(node, complaints);
        }
        if let Some(node) = fields.take("sshTests", complaints) {
            self.ssh_tests = ssh::tests(node, complaints);
        }
        if let Some(node) = fields.take("tests", complaints) {
            self.tests = tests_block::tests(node, complaints);
        }
        if let Some(node) = fields.take("options", complaints) {
            self.options(node, complaints);
        }
        if let Some(node) = fields.take("randomizeClientPort", complaints) {
            let value = decode::boolean(node, "\"randomizeClientPort\"", complaints);
            self.randomize_client_port = value.unwrap_or_default();
            self.randomize_span = node.span;
        }
        for idle in IDLE {
            fields.take(idle, complaints);
        }
        fields.finish(&SECTIONS, complaints);
    }

    fn options(&mut self, node: &Node, complaints: &mut Complaints) {
        let Some(mut fields) = Fields::of(node, "\"options\"", complaints) else {
            return;
        };
        if let Some(node) = fields.take("icmp", complaints) {
            match decode::string(node, "\"icmp\"", complaints) {
                Some(Spanned {
                    value: "any-rule", ..
                }) => self.icmp = Icmp::AnyRule,
                Some(Spanned {
                    value: "strict", ..
                }) => self.icmp = Icmp::Strict,
                Some(Spanned { value, span }) => complaints.add(
                    span,
                    format!("icmp is \"any-rule\" or \"strict\", not {value:?}"),
                ),
                None => {}
            }
        }
        fields.finish(&["icmp"], complaints);
    }
}

fn groups(
    node: &Node,
    complaints: &mut Complaints,
) -> BTreeMap<String, Spanned<Vec<Spanned<Selector>>>> {
    let mut groups = BTreeMap::new();
    for member in decode::map(node, "\"groups\"", complaints) {
        let name = member.name.trim();
        if name.strip_prefix("group:").is_none_or(str::is_empty) {
            let message = format!("a group is written \"group:NAME\", not {name:?}");
            complaints.add(member.name_span, message);
        }
        let users = decode::parsed(decode::some(&member.node), "a group", complaints, |text| {
            match Selector::parse(text) {
                Ok(user @ (Selector::User(_) | Selector::Domain(_))) => Ok(user),
                Ok(Selector::Group(_)) => Err(format!(
                    "groups[{name:?}]: {text:?}: group members cannot be recursive; name its users"
                )),
                _ => Err(format!(
                    "groups[{name:?}]: username must contain @, got {text:?}"
                )),
            }
        });
        let users = Spanned {
            value: users,
            span: member.name_span,
        };
        groups.insert(name.to_owned(), users);
    }
    groups
}

fn hosts(node: &Node, complaints: &mut Complaints) -> BTreeMap<String, Spanned<IpNet>> {
    let mut hosts = BTreeMap::new();
    for member in decode::map(node, "\"hosts\"", complaints) {
        let name = member.name.trim();
        if name.is_empty() || name.contains(['@', ':']) || name == "*" {
            let message =
                format!("a host's name is not empty and holds no '@' and no ':': {name:?}");
            complaints.add(member.name_span, message);
        }
        let Some(text) = decode::string(&member.node, "a host", complaints) else {
            continue;
        };
        match Selector::parse(text.value) {
            Ok(Selector::Prefix(net)) => {
                let net = Spanned { value: net, span: text.span };
                hosts.insert(name.to_owned(), net);
            }
            Err(message) => complaints.add(text.span, message),
            Ok(_) => complaints.add(
                text.span,
                format!(
                    "host {name:?}: hostname contains invalid IP address {:?}; write an address or a CIDR",
                    text.value
                ),
            ),
        }
    }
    hosts
}

fn tag_owners(
    node: &Node,
    complaints: &mut Complaints,
) -> BTreeMap<Tag, Spanned<Vec<Spanned<Selector>>>> {
    let mut tags = BTreeMap::new();
    for member in decode::map(node, "\"tagOwners\"", complaints) {
        let owners = decode::parsed(decode::some(&member.node), "tag owners", complaints, owner);
        match selector::parse_tag(member.name.trim()) {
            Ok(tag) => {
                let owners = Spanned {
                    value: owners,
                    span: member.name_span,
                };
                tags.insert(tag, owners);
            }
            Err(message) => complaints.add(member.name_span, message),
        }
    }
    tags
}

/// Whom a tag or a route may belong to.
fn owner(text: &str) -> Result<Selector, String> {
    match Selector::parse(text)? {
        owner @ (Selector::User(_)
        | Selector::Domain(_)
        | Selector::Group(_)
        | Selector::Idp(_)
        | Selector::Tag(_)
        | Selector::Autogroup(_)) => Ok(owner),
        _ => Err(format!(
            "{text:?} cannot own: name a user (with '@'), a group: or a tag:"
        )),
    }
}
