//! `acls`, `grants` and `denies`: three spellings of "who may, or may not, open what to whom".
//!
//! All become one shape, so that nothing after this file knows which spelling was used but for the
//! checks that differ.

use std::sync::Arc;

use super::super::hujson::{Node, Value};
use super::super::ports::{self, Ports, Protocol};
use super::super::problem::{Complaints, Span, Spanned};
use super::super::selector::{self, Selector};
use super::decode::{self, Fields};
use super::sections::posture_name;
use crate::node::Tag;

/// One entry of `acls`, `grants` or `denies`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::policy) struct Clause {
    pub(in crate::policy) span: Span,
    pub(in crate::policy) kind: Kind,
    pub(in crate::policy) src: Vec<Spanned<Selector>>,
    pub(in crate::policy) dst: Vec<Spanned<Target>>,
    /// Capability names and the JSON that goes with each.
    pub(in crate::policy) app: Vec<(Spanned<String>, Vec<String>)>,
    pub(in crate::policy) via: Vec<Spanned<Tag>>,
    /// `srcPosture`, where the clause has its own.
    pub(in crate::policy) posture: Option<Vec<Spanned<String>>>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(in crate::policy) enum Kind {
    Acl,
    Grant,
    Deny,
}

/// One destination, and what may be opened there: empty for a grant of capabilities alone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::policy) struct Target {
    pub(in crate::policy) selector: Selector,
    pub(in crate::policy) services: Services,
}

/// Shared by the destinations of a grant.
pub(in crate::policy) type Services = Arc<[(Protocol, Ports)]>;

impl Clause {
    /// What a policy without `acls` and `grants` says.
    pub(in crate::policy) fn allow_all() -> Self {
        let any = |value| Spanned {
            value,
            span: Span::default(),
        };
        let services = Arc::from([(None, Ports::all())]);
        Self {
            span: Span::default(),
            kind: Kind::Grant,
            src: vec![any(Selector::Any)],
            dst: vec![Spanned {
                value: Target {
                    selector: Selector::Any,
                    services,
                },
                span: Span::default(),
            }],
            app: Vec::new(),
            via: Vec::new(),
            posture: None,
        }
    }

    /// Capability names, each with its values as JSON.
    pub(in crate::policy) fn apps(&self) -> Vec<(String, Vec<String>)> {
        let named =
            |(name, values): &(Spanned<String>, Vec<String>)| (name.value.clone(), values.clone());
        self.app.iter().map(named).collect()
    }
}

pub(super) fn acls(node: &Node, complaints: &mut Complaints) -> Vec<Clause> {
    let items = decode::list(node, "\"acls\"", complaints);
    items
        .iter()
        .filter_map(|item| acl(item, complaints))
        .collect()
}

fn acl(node: &Node, complaints: &mut Complaints) -> Option<Clause> {
    let mut fields = Fields::of(node, "an entry of \"acls\"", complaints)?;
    fields.drop_remarks();
    let action = fields.take("action", complaints);
    match action.and_then(|node| decode::string(node, "\"action\"", complaints)) {
        Some(Spanned {
            value: "accept", ..
        }) => {}
        Some(Spanned { value, span }) => complaints.add(
            span,
            format!("action={value:?} is not supported; use \"accept\", and \"denies\" to forbid"),
        ),
        None if action.is_none() => {
            complaints.add(
                node.span,
                "action must be specified: add \"action\": \"accept\"",
            );
        }
        None => {}
    }
    Some(by_ports(fields, Kind::Acl, complaints))
}

pub(super) fn denies(node: &Node, complaints: &mut Complaints) -> Vec<Clause> {
    let items = decode::list(node, "\"denies\"", complaints);
    let deny = |item| {
        let mut fields = Fields::of(item, "an entry of \"denies\"", complaints)?;
        fields.take("comment", complaints);
        Some(by_ports(fields, Kind::Deny, complaints))
    };
    items.iter().filter_map(deny).collect()
}

/// The fields that `acls` and `denies` share.
fn by_ports(mut fields: Fields<'_>, kind: Kind, complaints: &mut Complaints) -> Clause {
    let span = fields.span;
    let protocol = fields
        .take("proto", complaints)
        .and_then(|node| decode::string(node, "\"proto\"", complaints))
        .and_then(|text| match ports::parse_protocol(text.value) {
            Ok(protocol) => protocol,
            Err(message) => {
                complaints.add(text.span, message);
                None
            }
        });
    let (src, dst) = match kind {
        Kind::Deny => (
            fields.take("src", complaints),
            fields.take("dst", complaints),
        ),
        // The hosted service still reads the names that the two had at first.
        Kind::Acl | Kind::Grant => (
            fields.take_either("src", "users", complaints),
            fields.take_either("dst", "ports", complaints),
        ),
    };
    // As in the reference, an accept of nothing is no mistake. A deny of nothing would be one that
    // lets everything through.
    if kind == Kind::Deny && (src.is_none() || dst.is_none()) {
        complaints.add(
            span,
            "\"src\" and \"dst\" must be specified: lists of selectors and of \"HOST:PORTS\"",
        );
    }
    let src = decode::parsed(src, "\"src\"", complaints, Selector::parse);
    let targets = decode::parsed(dst, "\"dst\"", complaints, selector::parse_destination);
    let mut dst = Vec::new();
    for Spanned {
        value: (selector, ports),
        span,
    } in targets
    {
        if !ports::has_ports(protocol) && !ports.is_all() {
            let name = protocol.map(ports::protocol_name).unwrap_or_default();
            complaints.add(
                span,
                format!("protocol {name:?} does not support specific ports, only '*'"),
            );
        }
        let services = Arc::from([(protocol, ports)]);
        dst.push(Spanned {
            value: Target { selector, services },
            span,
        });
    }
    let posture = match kind {
        Kind::Deny => None,
        Kind::Acl | Kind::Grant => postures(&mut fields, complaints),
    };
    fields.finish(
        match kind {
            Kind::Deny => &["src", "dst", "proto", "comment"],
            Kind::Acl | Kind::Grant => &["action", "proto", "src", "dst", "srcPosture"],
        },
        complaints,
    );
    Clause {
        span,
        kind,
        src,
        dst,
        app: Vec::new(),
        via: Vec::new(),
        posture,
    }
}

pub(super) fn grants(node: &Node, complaints: &mut Complaints) -> Vec<Clause> {
    let items = decode::list(node, "\"grants\"", complaints);
    items
        .iter()
        .filter_map(|item| grant(item, complaints))
        .collect()
}

fn grant(node: &Node, complaints: &mut Complaints) -> Option<Clause> {
    let mut fields = Fields::of(node, "an entry of \"grants\"", complaints)?;
    let src = fields.take("src", complaints);
    let src = decode::parsed(src, "\"src\"", complaints, Selector::parse);
    let dst = fields.take("dst", complaints);
    let selectors = decode::parsed(dst, "\"dst\"", complaints, Selector::parse);
    let ip = fields.take("ip", complaints);
    let services = decode::parsed(ip, "\"ip\"", complaints, ports::parse_grant_item);
    let services: Services = services.into_iter().map(|service| service.value).collect();
    let app = apps(&mut fields, complaints);
    let empty_ip = ip.is_none_or(decode::is_empty_list);
    if empty_ip && app.is_empty() {
        complaints.add(
            node.span,
            "ip and app can not both be empty: add \"ip\": [\"*\"] or what the grant opens",
        );
    }
    let via = decode::parsed(
        fields.take("via", complaints),
        "\"via\"",
        complaints,
        |text| match Selector::parse(text) {
            Ok(Selector::Tag(tag)) => Ok(tag),
            Err(error) if text.starts_with("tag:") => Err(error),
            _ => Err(format!("via can only be a tag, not {text:?}")),
        },
    );
    let posture = postures(&mut fields, complaints);
    fields.finish(
        &["src", "dst", "ip", "app", "via", "srcPosture"],
        complaints,
    );
    let dst = selectors
        .into_iter()
        .map(
            |Spanned {
                 value: selector,
                 span,
             }| Spanned {
                value: Target {
                    selector,
                    services: Arc::clone(&services),
                },
                span,
            },
        )
        .collect();
    Some(Clause {
        span: node.span,
        kind: Kind::Grant,
        src,
        dst,
        app,
        via,
        posture,
    })
}

fn postures(fields: &mut Fields<'_>, complaints: &mut Complaints) -> Option<Vec<Spanned<String>>> {
    let node = fields.take("srcPosture", complaints)?;
    let names = decode::parsed(Some(node), "\"srcPosture\"", complaints, |text| {
        posture_name(text)
    });
    Some(names)
}

fn apps(
    fields: &mut Fields<'_>,
    complaints: &mut Complaints,
) -> Vec<(Spanned<String>, Vec<String>)> {
    let Some(node) = fields.take("app", complaints) else {
        return Vec::new();
    };
    let mut apps = Vec::new();
    for member in decode::map(node, "\"app\"", complaints) {
        if let Err(message) = capability(&member.name) {
            complaints.add(member.name_span, message);
        }
        let values = match &member.node.value {
            Value::Null => &[],
            _ => decode::list(&member.node, "a capability's values", complaints),
        };
        let name = Spanned {
            value: member.name.clone(),
            span: member.name_span,
        };
        apps.push((
            name,
            values.iter().map(|value| value.value.to_json()).collect(),
        ));
    }
    apps
}

/// The hosted service's own names that a grant may use.
const SERVICE_CAPABILITIES: [&str; 6] =
    ["drive", "relay", "webui", "kubernetes", "tsidp", "secrets"];

fn capability(name: &str) -> Result<(), String> {
    let form = || format!("capability name must have the form {{domain}}/{{path}}, not {name:?}");
    if name.contains("://") {
        return Err(form());
    }
    let (domain, path) = name.split_once('/').ok_or_else(form)?;
    if domain.is_empty() || path.is_empty() {
        return Err(form());
    }
    let known = path
        .strip_prefix("cap/")
        .is_some_and(|name| SERVICE_CAPABILITIES.contains(&name));
    if domain == "tailscale.com" && !known {
        return Err(format!(
            "capability name must not be in the tailscale.com domain, but for cap/{{{}}}: {name:?}",
            SERVICE_CAPABILITIES.join(", ")
        ));
    }
    Ok(())
}
