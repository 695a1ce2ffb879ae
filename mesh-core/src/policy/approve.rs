//! Which advertised routes the policy approves by itself.
//!
//! Approval is a fact of the world, not of the policy: the coordinator adds what this says and
//! takes nothing back when the policy changes.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::problem::Spanned;
use super::resolve::{Resolver, Subjects};
use super::selector::Selector;
use super::syntax::Document;
use crate::node::Node;

/// Those of the node's advertised routes that `autoApprovers` approves: a subnet where the very
/// prefix or a wider one names the node's owner, an exit route only by `exitNode`.
pub fn auto_approved(document: &Document, subjects: &Subjects<'_>, node: &Node) -> BTreeSet<IpNet> {
    let resolver = Resolver::new(document, subjects.pools);
    let user = node.owner.user().and_then(|user| subjects.users.get(&user));
    let user = user.map(AsRef::as_ref);
    let approvers = &document.auto_approvers;
    let named = |owners: &[Spanned<Selector>]| {
        owners
            .iter()
            .any(|owner| resolver.extent(&owner.value).owns(&node.owner, user))
    };
    let approved = |route: &&IpNet| {
        if route.prefix_len() == 0 {
            return named(&approvers.exit_node);
        }
        approvers
            .routes
            .iter()
            .any(|(net, owners)| net.contains(*route) && named(owners))
    };
    node.advertised_routes
        .iter()
        .filter(approved)
        .copied()
        .collect()
}
