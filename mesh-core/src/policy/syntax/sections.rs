//! The sections that are maps or small lists: who approves routes, what attributes nodes get, sets
//! of addresses, postures.

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::super::hujson::{Node, Value};
use super::super::posture::Condition;
use super::super::problem::{Complaints, Span, Spanned};
use super::super::selector::{Autogroup, Selector};
use super::decode::{self, Fields};
use super::owner;

/// `autoApprovers`: whose advertised routes need no administrator.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(in crate::policy) struct AutoApprovers {
    pub(in crate::policy) routes: Vec<(IpNet, Vec<Spanned<Selector>>)>,
    pub(in crate::policy) exit_node: Vec<Spanned<Selector>>,
}

pub(super) fn auto_approvers(node: &Node, complaints: &mut Complaints) -> AutoApprovers {
    let mut approvers = AutoApprovers::default();
    let Some(mut fields) = Fields::of(node, "\"autoApprovers\"", complaints) else {
        return approvers;
    };
    if let Some(node) = fields.take("routes", complaints) {
        for member in decode::map(node, "\"routes\"", complaints) {
            let owners = decode::some(&member.node);
            let owners = decode::parsed(owners, "approvers", complaints, owner);
            match Selector::parse(&member.name) {
                Ok(Selector::Prefix(net)) => approvers.routes.push((net, owners)),
                _ => {
                    let message = format!("{:?} is not a CIDR, as routes are", member.name);
                    complaints.add(member.name_span, message);
                }
            }
        }
    }
    let exit_node = fields.take("exitNode", complaints);
    approvers.exit_node = decode::parsed(exit_node, "\"exitNode\"", complaints, owner);
    // Services, which are the hosted service's alone.
    fields.take("services", complaints);
    fields.finish(&["routes", "exitNode"], complaints);
    approvers
}

/// One entry of `nodeAttrs`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::policy) struct NodeAttributes {
    pub(in crate::policy) span: Span,
    pub(in crate::policy) target: Vec<Spanned<Selector>>,
    pub(in crate::policy) attributes: Vec<String>,
    pub(in crate::policy) ip_pool: Vec<Spanned<IpNet>>,
}

pub(super) fn node_attributes(node: &Node, complaints: &mut Complaints) -> Vec<NodeAttributes> {
    let items = decode::list(node, "\"nodeAttrs\"", complaints);
    let one = |item| {
        let mut fields = Fields::of(item, "an entry of \"nodeAttrs\"", complaints)?;
        let target = fields.take("target", complaints);
        let target = decode::parsed(target, "\"target\"", complaints, Selector::parse);
        let attributes = fields.take("attr", complaints);
        let attributes = decode::parsed(attributes, "\"attr\"", complaints, |text| match text {
            "" => Err("an attribute cannot be empty".to_owned()),
            _ => Ok(text.to_owned()),
        });
        let pool = fields.take("ipPool", complaints);
        let ip_pool = decode::parsed(pool, "\"ipPool\"", complaints, pool_prefix);
        // App connectors, which are the hosted service's alone.
        fields.take("app", complaints);
        fields.finish(&["target", "attr", "ipPool"], complaints);
        Some(NodeAttributes {
            span: item.span,
            target,
            attributes: attributes.into_iter().map(|text| text.value).collect(),
            ip_pool,
        })
    };
    items.iter().filter_map(one).collect()
}

fn pool_prefix(text: &str) -> Result<IpNet, String> {
    match Selector::parse(text) {
        Ok(Selector::Prefix(net)) => Ok(net),
        _ => Err(format!("IPPool({text}): not a CIDR")),
    }
}

/// One step of building an ip set: take these addresses in, or leave them out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::policy) struct SetStep {
    pub(in crate::policy) adds: bool,
    pub(in crate::policy) selector: Selector,
}

pub(super) type IpSets = BTreeMap<String, Spanned<Vec<Spanned<SetStep>>>>;

pub(super) fn ip_sets(node: &Node, complaints: &mut Complaints) -> IpSets {
    let mut sets = BTreeMap::new();
    for member in decode::map(node, "\"ipsets\"", complaints) {
        let name = member.name.trim();
        if name.strip_prefix("ipset:").is_none_or(str::is_empty) {
            let message = format!("an ip set is written \"ipset:NAME\", not {name:?}");
            complaints.add(member.name_span, message);
        }
        let steps = decode::parsed(
            decode::some(&member.node),
            "an ip set",
            complaints,
            set_step,
        );
        let steps = Spanned {
            value: steps,
            span: member.name_span,
        };
        sets.insert(name.to_owned(), steps);
    }
    sets
}

fn set_step(text: &str) -> Result<SetStep, String> {
    let (adds, of) = match text.split_once(char::is_whitespace) {
        Some(("add", of)) => (true, of),
        Some(("remove", of)) => (false, of),
        _ => (true, text),
    };
    match Selector::parse(of)? {
        selector @ (Selector::Prefix(_)
        | Selector::Host(_)
        | Selector::IpSet(_)
        | Selector::Autogroup(Autogroup::Internet)) => Ok(SetStep { adds, selector }),
        _ => Err(format!(
            "{text:?}: an ip set is made of addresses, CIDRs, hosts, autogroup:internet and other ip sets, each with \"add\" or \"remove\" before it"
        )),
    }
}

pub(super) type Postures = BTreeMap<String, Spanned<Vec<Condition>>>;

pub(super) fn postures(node: &Node, complaints: &mut Complaints) -> Postures {
    let mut postures = BTreeMap::new();
    for member in decode::map(node, "\"postures\"", complaints) {
        let name = posture_name(&member.name).unwrap_or_else(|message| {
            complaints.add(member.name_span, message);
            member.name.clone()
        });
        let conditions = match &member.node.value {
            Value::Null => None,
            _ => Some(&member.node),
        };
        let conditions = decode::parsed(conditions, "a posture", complaints, Condition::parse);
        if conditions.is_empty() && complaints.is_empty() {
            let message = format!("{name} has no conditions: every node would have it");
            complaints.add(member.name_span, message);
        }
        let conditions = Spanned {
            value: conditions.into_iter().map(|one| one.value).collect(),
            span: member.name_span,
        };
        postures.insert(name, conditions);
    }
    postures
}

pub(super) fn posture_name(text: &str) -> Result<String, String> {
    match text.trim().strip_prefix("posture:") {
        Some(name) if !name.is_empty() => Ok(text.trim().to_owned()),
        _ => Err(format!(
            "a posture is written \"posture:NAME\", not {text:?}"
        )),
    }
}
