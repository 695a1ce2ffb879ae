//! Answers as lines for people and as JSON for programs: both from the same values, here, so that
//! every command and every API says the same.

use serde_json::{Value, json};

use super::flow::{AtEnd, Explanation, Judged, Reason};
use super::reach::{Reach, Row};
use super::words;
use crate::netmap::{Action, Rule};

/// An answer in both of its forms.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    pub lines: Vec<String>,
    pub json: Value,
}

impl From<Explanation> for Answer {
    fn from(explanation: Explanation) -> Self {
        let flows = &explanation.flows;
        Self {
            lines: flows
                .iter()
                .flat_map(|one| judged(one, one.family_among(flows)))
                .collect(),
            json: json!({"flows": flows.iter().map(judged_json).collect::<Vec<_>>()}),
        }
    }
}

impl Judged {
    /// Which family it is about, where the other one is judged otherwise.
    fn family_among(&self, flows: &[Self]) -> &'static str {
        let ends = |judged: &Self| (judged.src.clone(), judged.dst.clone());
        let alone = flows
            .iter()
            .filter(|other| ends(other) == ends(self))
            .count()
            == 1;
        match self.addresses.first() {
            Some(_) if alone => "",
            Some((src, _)) if src.is_ipv4() => " over IPv4",
            Some(_) => " over IPv6",
            None => "",
        }
    }
}

fn judged(judged: &Judged, family: &str) -> Vec<String> {
    let verdict = if judged.accepted { "allowed" } else { "denied" };
    let mut lines = vec![format!(
        "{} -> {} {}{family}: {verdict}",
        judged.src, judged.dst, judged.service
    )];
    for (end, side) in [(&judged.egress, "egress"), (&judged.ingress, "ingress")] {
        let node = end.node.as_deref().unwrap_or("nobody");
        lines.push(format!("  {side} at {node}: {}", because(end)));
    }
    lines.extend(judged.turn.iter().map(|line| format!("  {line}")));
    lines
}

fn because(end: &AtEnd) -> String {
    let verb = match end.action {
        Action::Accept => "allowed",
        Action::Deny => "denied",
    };
    match &end.reason {
        Reason::Rule(rule) => format!("{verb} by {}  {}", rule.place(), rule.summary),
        Reason::NoRule => "denied, for no rule allows it".to_owned(),
        Reason::Unknown => {
            "denied: nothing is open between the two, so they do not know each other".to_owned()
        }
        Reason::Nobody => "denied: there is nobody to take it".to_owned(),
        Reason::Elsewhere => "judged there, by the same policy".to_owned(),
    }
}

fn judged_json(judged: &Judged) -> Value {
    let addresses = judged.addresses.iter();
    let addresses =
        addresses.map(|(src, dst)| json!({"src": src.to_string(), "dst": dst.to_string()}));
    json!({
        "src": judged.src,
        "dst": judged.dst,
        "addresses": addresses.collect::<Vec<_>>(),
        "service": judged.service,
        "allowed": judged.accepted,
        "egress": end_json(&judged.egress),
        "ingress": end_json(&judged.ingress),
        "turn": judged.turn,
    })
}

fn end_json(end: &AtEnd) -> Value {
    let (reason, rule) = match &end.reason {
        Reason::Rule(rule) => ("rule", Some(rule_json(rule))),
        Reason::NoRule => ("no rule", None),
        Reason::Unknown => ("unknown identity", None),
        Reason::Nobody => ("nobody", None),
        Reason::Elsewhere => ("elsewhere", None),
    };
    json!({
        "node": end.node,
        "allowed": match end.reason {
            Reason::Elsewhere => None,
            _ => Some(end.action == Action::Accept),
        },
        "reason": reason,
        "rule": rule,
    })
}

pub(in crate::policy) fn rule_json(rule: &Rule) -> Value {
    json!({"file": rule.file.as_ref(), "line": rule.line, "text": rule.summary})
}

/// Which way a [`Reach`] was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    WhoCan,
    WhatCan,
}

impl Reach {
    pub fn answer(&self, way: Way) -> Answer {
        let mut lines = Vec::new();
        let mut subjects = Vec::new();
        for (names, rows) in &self.subjects {
            let names_text = names.join(", ");
            lines.push(match (way, rows.is_empty()) {
                (Way::WhoCan, true) => format!("{names_text}: nobody can"),
                (Way::WhoCan, false) => format!("{names_text}: these can"),
                (Way::WhatCan, true) => format!("{names_text} can open nothing"),
                (Way::WhatCan, false) => format!("{names_text} can open"),
            });
            for Row {
                services,
                rule,
                others,
                ..
            } in rows
            {
                let others = words::some(others.iter().cloned());
                let place = rule.place();
                lines.push(match way {
                    Way::WhoCan => format!("  {others}: {services}, by {place}  {}", rule.summary),
                    Way::WhatCan => {
                        format!("  {services} to {others}, by {place}  {}", rule.summary)
                    }
                });
            }
            let rows = rows.iter().map(|row| {
                json!({
                    "services": row.services,
                    "rule": rule_json(&row.rule),
                    "names": row.names,
                })
            });
            let (subject, others) = match way {
                Way::WhoCan => ("destinations", "sources"),
                Way::WhatCan => ("sources", "destinations"),
            };
            subjects.push(json!({subject: names, others: rows.collect::<Vec<_>>()}));
        }
        Answer {
            lines,
            json: json!({"answers": subjects}),
        }
    }
}
