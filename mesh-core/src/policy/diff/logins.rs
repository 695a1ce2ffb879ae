//! What a new policy changes of who may log in to whom.
//!
//! Rules of `ssh` name nodes by their owners alone, so one node of each owner stands for the rest.

use std::collections::BTreeSet;

use super::{Found, What};
use crate::netmap::Rule;
use crate::node::NodeId;
use crate::policy::explain::{End, Explainer};
use crate::policy::ssh::SshRule;
use crate::policy::syntax::SshAction;

/// No account: what is allowed to it is allowed to any but root.
const ANY: &str = "*";

pub(super) fn compared(old: &Explainer<'_>, new: &Explainer<'_>, ends: &[End]) -> Found {
    let mut found = Found::new();
    for (to, dst) in ends.iter().enumerate() {
        let Some(node) = dst.nodes.first() else {
            continue;
        };
        let (before, after) = (old.logins(*node), new.logins(*node));
        if before == after {
            continue;
        }
        let accounts: BTreeSet<&str> = before
            .iter()
            .chain(&after)
            .flat_map(|rule| rule.logins.iter().map(String::as_str))
            .chain([ANY])
            .collect();
        for (from, src) in ends.iter().enumerate() {
            // Among an owner's own nodes it is another one that logs in.
            let source = src.nodes.iter().find(|source| *source != node);
            let Some(source) = source else { continue };
            for account in &accounts {
                let [was, is] = [&before, &after].map(|rules| allowed(rules, *source, account));
                let checked = |found: Option<(bool, u32)>| found.map(|(checked, _)| checked);
                if checked(was) == checked(is) {
                    continue;
                }
                for (gained, side, found_at) in [(false, old, was), (true, new, is)] {
                    let Some((checked, line)) = found_at else {
                        continue;
                    };
                    let account = match *account {
                        ANY => "any account but root",
                        account => account,
                    };
                    let what = What::LogIn {
                        account: account.to_owned(),
                        checked,
                    };
                    let rule = Rule {
                        file: side.file(),
                        line,
                        summary: format!("ssh as {account}"),
                    };
                    let pairs = found.entry((gained, rule, what)).or_default();
                    pairs.entry(from).or_default().insert(to);
                }
            }
        }
    }
    found
}

/// Whether a check is asked for, and the line that says so; `None` where nothing allows it.
fn allowed(rules: &[SshRule], source: NodeId, account: &str) -> Option<(bool, u32)> {
    let rule = rules.iter().find(|rule| rule.matches(source, account))?;
    Some((rule.action != SshAction::Accept, rule.line))
}
