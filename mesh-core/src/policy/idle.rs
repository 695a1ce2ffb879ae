//! What a text says that has no effect here, or more than its author may think.
//!
//! A policy written for another coordinator is taken as it is. What this one does not do must not be
//! passed over in silence: an operator may rely on it. So every such part is named, with its line.
//! Read from the text anew, since most of what is looked for here leaves no trace behind the parser.
//! Nor must a text be silent that opens the mesh by what it leaves out, such as an empty file.

use super::hujson::{self, Member, Node, Value};
use super::problem::{Complaints, Problem, Span};
use super::selector::Selector;
use super::syntax::Document;

/// Sections that are read and do nothing.
const SECTIONS: [(&str, &str); 4] = [
    ("derpMap", "the mesh uses its own relays alone"),
    ("disableIPv4", "every node has an IPv4 address"),
    ("OneCGNATRoute", "only the mesh's own prefixes are routed"),
    (
        "randomizeClientPort",
        "agents take the port of their settings",
    ),
];

/// Posture attributes that agents report and the coordinator keeps.
const REPORTED: [&str; 6] = [
    "node:os",
    "node:osVersion",
    "node:kernel",
    "node:meshVersion",
    "node:firstSeen",
    "ip:country",
];

impl Document {
    /// What is said of a text without `acls` and `grants`, which allows everything.
    pub fn open(&self) -> Option<&'static str> {
        match (self.unrestricted, self.clauses.is_empty()) {
            (false, _) => None,
            (true, true) => Some(
                "the policy has no \"acls\" and no \"grants\": every node may reach every other",
            ),
            (true, false) => Some(
                "the policy has no \"acls\" and no \"grants\": every node may reach every other, but \
                 for its \"denies\"",
            ),
        }
    }

    /// That the text is open, and each part of it that is accepted and has no effect, in its order.
    pub fn warnings(&self) -> Vec<Problem> {
        let mut complaints = Complaints::default();
        if let Some(open) = self.open() {
            complaints.add(Span::default(), open);
        }
        if let Ok(Some(node)) = hujson::parse(self.text()) {
            for member in members(&node) {
                section(member, &mut complaints);
            }
        }
        let found = complaints.settle(self.text()).err();
        found
            .iter()
            .flat_map(|found| found.iter().cloned())
            .collect()
    }
}

fn section(member: &Member, complaints: &mut Complaints) {
    let node = &member.node;
    let is = |name: &str| member.name.eq_ignore_ascii_case(name);
    if matches!(node.value, Value::Null | Value::Bool(false)) {
        return;
    }
    if let Some((name, instead)) = SECTIONS.iter().find(|(name, _)| is(name)) {
        complaints.add(
            member.name_span,
            format!("{name:?} has no effect: {instead}"),
        );
    } else if is("ssh") {
        ssh(member, complaints);
    } else if is("nodeAttrs") {
        items(node).for_each(|entry| node_attributes(entry, complaints));
    } else if is("autoApprovers") {
        for services in members(node)
            .iter()
            .filter(|field| named(field, "services"))
        {
            let message = "\"services\" has no effect: this mesh has none";
            complaints.add(services.name_span, message);
        }
    } else if is("grants") {
        for app in items(node)
            .flat_map(members)
            .filter(|field| named(field, "app"))
        {
            let message = "\"app\" has no effect yet: capabilities are checked and told to nobody";
            complaints.add(app.name_span, message);
        }
    } else if is("postures") {
        for posture in members(node) {
            items(&posture.node).for_each(|condition| posture_condition(condition, complaints));
        }
    }
    if is("grants") || is("acls") || is("ssh") || is("denies") {
        let ends = items(node)
            .flat_map(members)
            .filter(|field| named(field, "src"));
        for src in ends.flat_map(|field| items(&field.node)) {
            if text(src) == Some("autogroup:shared") {
                let message = "autogroup:shared means nobody: nodes are not shared between meshes";
                complaints.add(src.span, message);
            }
        }
    }
}

fn ssh(member: &Member, complaints: &mut Complaints) {
    if items(&member.node).next().is_some() {
        let message = "\"ssh\" has no effect yet: its rules are checked and tested, but no agent \
                       takes SSH sessions; those of the host's own server are a matter of port 22";
        complaints.add(member.name_span, message);
    }
    for field in items(&member.node).flat_map(members) {
        if named(field, "recorder") || named(field, "enforceRecorder") {
            let message = format!("{:?} has no effect: sessions are not recorded", field.name);
            complaints.add(field.name_span, message);
        }
    }
}

fn node_attributes(entry: &Node, complaints: &mut Complaints) {
    for field in members(entry) {
        if named(field, "attr") {
            for attribute in items(&field.node) {
                let name = text(attribute).unwrap_or_default();
                let why = match name {
                    "disable-ipv4" => "every node has an IPv4 address, and its peers use it",
                    _ => "no agent knows it",
                };
                let message = format!("the attribute {name:?} has no effect: {why}");
                complaints.add(attribute.span, message);
            }
        } else if named(field, "target") && members(entry).iter().any(|f| named(f, "ipPool")) {
            items(&field.node).for_each(|target| pool_target(target, complaints));
        } else if named(field, "app") {
            let message = "\"app\" has no effect: there are no app connectors";
            complaints.add(field.name_span, message);
        }
    }
}

fn pool_target(target: &Node, complaints: &mut Complaints) {
    let selector = text(target).map(Selector::parse);
    if let Some(Ok(literal @ (Selector::Prefix(_) | Selector::Host(_) | Selector::IpSet(_)))) =
        selector
    {
        let message = format!(
            "\"ipPool\" has no effect on {literal}: a node has no address yet when it is given one; \
             name its owner"
        );
        complaints.add(target.span, message);
    }
}

fn posture_condition(condition: &Node, complaints: &mut Complaints) {
    let written = text(condition).unwrap_or_default();
    let attribute = written.split_whitespace().next().unwrap_or_default();
    if !attribute.starts_with("custom:") && !REPORTED.contains(&attribute) {
        let message = format!(
            "nobody reports {attribute:?}: it is never set; known are {} and custom:NAME",
            REPORTED.join(", ")
        );
        complaints.add(condition.span, message);
    }
}

fn named(member: &Member, name: &str) -> bool {
    member.name.eq_ignore_ascii_case(name) && member.node.value != Value::Null
}

fn members(node: &Node) -> &[Member] {
    match &node.value {
        Value::Object(members) => members,
        _ => &[],
    }
}

fn items(node: &Node) -> impl Iterator<Item = &Node> {
    match &node.value {
        Value::Array(items) => items.iter(),
        _ => [].iter(),
    }
}

fn text(node: &Node) -> Option<&str> {
    match &node.value {
        Value::String(text) => Some(text.trim()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warnings(text: &str) -> Vec<String> {
        let document = Document::parse(text).unwrap();
        let shown = |one: &Problem| format!("{}:{} {}", one.line, one.column, one.message);
        document.warnings().iter().map(shown).collect()
    }

    #[test]
    fn what_a_policy_from_elsewhere_says_is_accepted_and_named() {
        let warnings = warnings(
            r#"{
  "derpMap": {"OmitDefaultRegions": true}, "disableIPv4": true, "OneCGNATRoute": "",
  "randomizeClientPort": true,
  "tagOwners": {"tag:rec": []}, "autoApprovers": {"services": {"svc:web": ["tag:rec"]}},
  "nodeAttrs": [
    {"target": ["*"], "attr": ["funnel", "disable-ipv4"]},
    {"target": ["100.64.0.7"], "app": {"tailscale.com/app-connectors": []}, "ipPool": ["100.64.1.0/24"]},
  ],
  "postures": {"posture:a": ["node:tsVersion >= '1.40'", "node:os == 'linux'", "custom:x IS SET"]},
  "ssh": [{"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self"],
    "users": ["root"], "recorder": ["tag:rec"], "enforceRecorder": true}],
  "grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"], "app": {"example.com/cap/x": []}}],
}"#,
        );
        insta::assert_snapshot!(warnings.join("\n"), @r#"
        2:3 "derpMap" has no effect: the mesh uses its own relays alone
        2:44 "disableIPv4" has no effect: every node has an IPv4 address
        2:65 "OneCGNATRoute" has no effect: only the mesh's own prefixes are routed
        3:3 "randomizeClientPort" has no effect: agents take the port of their settings
        4:51 "services" has no effect: this mesh has none
        6:32 the attribute "funnel" has no effect: no agent knows it
        6:42 the attribute "disable-ipv4" has no effect: every node has an IPv4 address, and its peers use it
        7:17 "ipPool" has no effect on 100.64.0.7: a node has no address yet when it is given one; name its owner
        7:32 "app" has no effect: there are no app connectors
        9:30 nobody reports "node:tsVersion": it is never set; known are node:os, node:osVersion, node:kernel, node:meshVersion, node:firstSeen, ip:country and custom:NAME
        10:3 "ssh" has no effect yet: its rules are checked and tested, but no agent takes SSH sessions; those of the host's own server are a matter of port 22
        11:24 "recorder" has no effect: sessions are not recorded
        11:49 "enforceRecorder" has no effect: sessions are not recorded
        12:56 "app" has no effect yet: capabilities are checked and told to nobody
        "#);
    }

    #[test]
    fn what_works_is_not_named() {
        assert!(warnings(crate::policy::EXAMPLE).is_empty());
        let off = r#"{"disableIPv4": false, "ssh": [], "nodeAttrs": [], "acls": []}"#;
        assert!(warnings(off).is_empty());
    }

    #[test]
    fn a_text_that_opens_the_mesh_by_its_silence_is_told_of() {
        let open =
            r#"1:1 the policy has no "acls" and no "grants": every node may reach every other"#;
        for text in ["", "  // nothing yet\n", "{}", r#"{"groups": {}}"#] {
            assert_eq!(warnings(text), [open], "{text:?}");
        }
        let denies = r#"{"denies": [{"src": ["*"], "dst": ["*:22"]}]}"#;
        assert_eq!(
            warnings(denies),
            [format!("{open}, but for its \"denies\"")]
        );
        for text in [
            r#"{"acls": []}"#,
            r#"{"grants": []}"#,
            crate::policy::ALLOW_ALL,
        ] {
            assert_eq!(warnings(text), [""; 0], "{text:?}");
        }
    }
}
