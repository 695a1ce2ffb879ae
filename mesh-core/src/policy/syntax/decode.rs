//! From values to typed fields, collecting what is wrong on the way.
//!
//! As in the reference, member names of the language itself are matched without regard to case,
//! `null` is the same as absent, and a member that nobody knows is an error: a misspelt `src` must
//! not quietly mean "nobody".

use super::super::hujson::{Member, Node, Value};
use super::super::problem::{Complaints, Span, Spanned};

/// The members of one object of the language, by their lower-case names.
pub(super) struct Fields<'a> {
    members: Vec<(&'a Member, bool)>,
    pub(super) span: Span,
}

impl<'a> Fields<'a> {
    /// `None`, complained of, where `node` is no object.
    pub(super) fn of(node: &'a Node, what: &str, complaints: &mut Complaints) -> Option<Self> {
        let Value::Object(members) = &node.value else {
            expected(node, &format!("{what} to be an object {{…}}"), complaints);
            return None;
        };
        Some(Self {
            members: members.iter().map(|member| (member, false)).collect(),
            span: node.span,
        })
    }

    /// Takes a member out; a second one that differs only in case is complained of.
    pub(super) fn take(&mut self, name: &str, complaints: &mut Complaints) -> Option<&'a Node> {
        let mut found: Option<&'a Node> = None;
        for (member, taken) in &mut self.members {
            if !member.name.eq_ignore_ascii_case(name) {
                continue;
            }
            *taken = true;
            if found.is_some() {
                let message = format!("{name:?} stands twice in this object: merge the two");
                complaints.add(member.name_span, message);
            }
            if member.node.value != Value::Null {
                found = Some(&member.node);
            }
        }
        found
    }

    /// A member that has two names; both at once is complained of.
    pub(super) fn take_either(
        &mut self,
        name: &str,
        old: &str,
        complaints: &mut Complaints,
    ) -> Option<&'a Node> {
        match (self.take(name, complaints), self.take(old, complaints)) {
            (Some(_), Some(both)) => {
                let message = format!("{old:?} is the old name of {name:?}: merge the two");
                complaints.add(both.span, message);
                None
            }
            (new, old) => new.or(old),
        }
    }

    /// Drops members whose names start with `#`, which ACL entries may carry as remarks.
    pub(super) fn drop_remarks(&mut self) {
        self.members
            .retain(|(member, _)| !member.name.starts_with('#'));
    }

    /// Complains of every member that was not taken.
    pub(super) fn finish(self, known: &[&str], complaints: &mut Complaints) {
        for (member, taken) in self.members {
            if !taken {
                let message = format!(
                    "unknown field: {:?}; known here: {}",
                    member.name,
                    known.join(", ")
                );
                complaints.add(member.name_span, message);
            }
        }
    }
}

fn expected(node: &Node, what: &str, complaints: &mut Complaints) {
    let message = format!("expected {what}, found {}", node.value.kind());
    complaints.add(node.span, message);
}

/// The members of a map whose names are the policy's own: groups, hosts, tags.
pub(super) fn map<'a>(node: &'a Node, what: &str, complaints: &mut Complaints) -> &'a [Member] {
    if let Value::Object(members) = &node.value {
        return members;
    }
    expected(node, &format!("{what} to be an object {{…}}"), complaints);
    &[]
}

pub(super) fn list<'a>(node: &'a Node, what: &str, complaints: &mut Complaints) -> &'a [Node] {
    if let Value::Array(items) = &node.value {
        return items;
    }
    expected(node, &format!("{what} to be a list […]"), complaints);
    &[]
}

/// Trimmed, as the reference trims.
pub(super) fn string<'a>(
    node: &'a Node,
    what: &str,
    complaints: &mut Complaints,
) -> Option<Spanned<&'a str>> {
    if let Value::String(text) = &node.value {
        return Some(Spanned {
            value: text.trim(),
            span: node.span,
        });
    }
    expected(node, &format!("{what} to be a string"), complaints);
    None
}

pub(super) fn boolean(node: &Node, what: &str, complaints: &mut Complaints) -> Option<bool> {
    if let Value::Bool(value) = node.value {
        return Some(value);
    }
    expected(node, &format!("{what} to be true or false"), complaints);
    None
}

/// A list of strings, each parsed; what does not parse is complained of and left out.
pub(super) fn parsed<T>(
    node: Option<&Node>,
    what: &str,
    complaints: &mut Complaints,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Vec<Spanned<T>> {
    let Some(node) = node else { return Vec::new() };
    let mut values = Vec::new();
    for item in list(node, what, complaints) {
        let Some(Spanned { value, span }) = string(item, what, complaints) else {
            continue;
        };
        match parse(value) {
            Ok(value) => values.push(Spanned { value, span }),
            Err(message) => complaints.add(span, message),
        }
    }
    values
}

/// A member that must be a string; empty, at the object, where it is missing.
pub(super) fn text(
    fields: &mut Fields<'_>,
    name: &str,
    complaints: &mut Complaints,
) -> Spanned<String> {
    let missing = Spanned {
        value: String::new(),
        span: fields.span,
    };
    fields
        .take(name, complaints)
        .and_then(|node| string(node, &format!("{name:?}"), complaints))
        .map_or(missing, |text| Spanned {
            value: text.value.to_owned(),
            span: text.span,
        })
}

/// `null` is the same as absent.
pub(super) fn some(node: &Node) -> Option<&Node> {
    (node.value != Value::Null).then_some(node)
}

pub(super) fn is_empty_list(node: &Node) -> bool {
    matches!(&node.value, Value::Array(items) if items.is_empty())
}
