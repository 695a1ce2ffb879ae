//! Rules that rank the mesh's table with the host's.
//!
//! Ours are known by their protocol number and priority, so that a rule which an older version
//! left, or somebody's hand changed, is seen and taken away.

use std::collections::BTreeSet;

use anyhow::Context as _;
use futures_util::TryStreamExt as _;
use mesh_core::routes::{
    FIRST_PRIORITY, FWMARK, FWMARK_MASK, Family, LAST_PRIORITY, PROTOCOL, Rule,
};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::{Handle, IpVersion};

use super::is_errno;

/// Stands for the table of a rule that is not what we would have written.
const NO_TABLE: u32 = 0;

pub(super) async fn ours(handle: &Handle) -> anyhow::Result<BTreeSet<Rule>> {
    let mut found = BTreeSet::new();
    for (family, version) in [(Family::V4, IpVersion::V4), (Family::V6, IpVersion::V6)] {
        let rules: Result<Vec<RuleMessage>, _> =
            handle.rule().get(version).execute().try_collect().await;
        let rules = match rules {
            // A kernel without IPv6.
            Err(error) if is_errno(&error, libc::EAFNOSUPPORT) => Vec::new(),
            rules => rules.context("list the routing rules")?,
        };
        found.extend(rules.iter().filter_map(|rule| decode(family, rule)));
    }
    Ok(found)
}

pub(super) async fn add(handle: &Handle, rule: &Rule) -> anyhow::Result<()> {
    let mut request = handle.rule().add();
    *request.message_mut() = message(rule);
    match request.execute().await {
        Err(error) if is_errno(&error, libc::EEXIST) => Ok(()),
        result => Ok(result?),
    }
}

pub(super) async fn remove(handle: &Handle, rule: &Rule) -> anyhow::Result<()> {
    // The kernel compares what is given: family, priority and protocol are enough to mean ours.
    let mut ours = RuleMessage::default();
    ours.header.family = address_family(rule.family);
    ours.attributes = vec![
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::Protocol(PROTOCOL.into()),
    ];
    match handle.rule().del(ours).execute().await {
        Err(error) if is_errno(&error, libc::ENOENT) => Ok(()),
        result => Ok(result?),
    }
}

fn message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = address_family(rule.family);
    message.header.action = RuleAction::ToTable;
    message.header.flags = RuleFlags::Invert;
    message.attributes = vec![
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::FwMark(FWMARK),
        RuleAttribute::FwMask(FWMARK_MASK),
        RuleAttribute::Table(rule.table),
        RuleAttribute::Protocol(PROTOCOL.into()),
    ];
    let suppress = rule.suppress.map(RuleAttribute::SuppressPrefixLen);
    message.attributes.extend(suppress);
    message
}

fn decode(family: Family, message: &RuleMessage) -> Option<Rule> {
    let mut table = u32::from(message.header.table);
    let (mut priority, mut suppress, mut protocol) = (None, None, None);
    let mut mark = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(number) => priority = Some(*number),
            RuleAttribute::Table(number) => table = *number,
            RuleAttribute::Protocol(number) => protocol = Some(u8::from(*number)),
            RuleAttribute::FwMark(value) => mark.0 = Some(*value),
            RuleAttribute::FwMask(value) => mark.1 = Some(*value),
            RuleAttribute::SuppressPrefixLen(length) => {
                suppress = Some(*length).filter(|l| *l != u32::MAX);
            }
            _ => {}
        }
    }
    let priority = priority.filter(|p| (FIRST_PRIORITY..=LAST_PRIORITY).contains(p))?;
    if protocol != Some(PROTOCOL) {
        return None;
    }
    let exact = mark == (Some(FWMARK), Some(FWMARK_MASK))
        && message.header.flags.contains(RuleFlags::Invert)
        && message.header.action == RuleAction::ToTable;
    Some(Rule {
        family,
        priority,
        table: if exact { table } else { NO_TABLE },
        suppress,
    })
}

fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule() -> Rule {
        Rule {
            family: Family::V6,
            priority: FIRST_PRIORITY + 3,
            table: 7700,
            suppress: Some(47),
        }
    }

    #[test]
    fn a_rule_survives_the_wire_form() {
        assert_eq!(decode(Family::V6, &message(&rule())), Some(rule()));
    }

    #[test]
    fn a_rule_of_ours_that_was_changed_is_seen_as_another() {
        let mut changed = message(&rule());
        changed.header.flags = RuleFlags::empty();
        let seen = decode(Family::V6, &changed).unwrap();
        assert_ne!(seen, rule());
        assert_eq!(seen.priority, rule().priority, "so that it can be removed");
    }

    #[test]
    fn rules_of_others_are_not_seen() {
        let mut theirs = message(&rule());
        theirs
            .attributes
            .retain(|attribute| !matches!(attribute, RuleAttribute::Protocol(_)));
        assert_eq!(decode(Family::V6, &theirs), None);
    }
}
