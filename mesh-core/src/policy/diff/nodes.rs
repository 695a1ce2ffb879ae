//! What a new policy changes of nodes by themselves: attributes, routes that need no administrator,
//! and where new nodes get their addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;

use super::{Found, What};
use crate::netmap::Rule;
use crate::node::Node;
use crate::policy::approve::auto_approved;
use crate::policy::explain::{End, Explainer};
use crate::policy::pools::allotment;
use crate::policy::problem::Spanned;
use crate::policy::selector::Selector;

/// What one side says of an end, each with its line.
type Said = BTreeMap<String, u32>;

/// Of ends of one node each.
pub(super) fn attributes(old: &Explainer<'_>, new: &Explainer<'_>, ends: &[End]) -> Found {
    let mut found = Found::new();
    for (index, end) in ends.iter().enumerate() {
        let Some(node) = end.nodes.first() else {
            continue;
        };
        let said = [old, new].map(|side| side.compiled.attributes_at(*node));
        note(&mut found, [old, new], index, said, What::Have);
    }
    found
}

/// Of ends of one owner each: approvals and pools name nobody else.
pub(super) fn by_owner(old: &Explainer<'_>, new: &Explainer<'_>, ends: &[End]) -> Found {
    let mut found = Found::new();
    let sides = [old, new];
    let routes = sides.iter().flat_map(|side| {
        let routes = side.document.auto_approvers.routes.iter();
        routes.map(|(net, _)| *net)
    });
    let exits = ["0.0.0.0/0", "::/0"].into_iter();
    let exits = exits.filter_map(|text| text.parse::<IpNet>().ok());
    let routes: BTreeSet<IpNet> = routes.chain(exits).collect();
    for (index, end) in ends.iter().enumerate() {
        let node = end.nodes.first().and_then(|id| new.node(*id));
        let Some(node) = node.map(Arc::as_ref) else {
            continue;
        };
        let approved = sides.map(|side| approvals(side, node, &routes));
        note(&mut found, sides, index, approved, What::Serve);
        let pool = sides.map(|side| pool(side, node));
        note(&mut found, sides, index, pool, What::Draw);
    }
    found
}

fn note(
    found: &mut Found,
    [old, new]: [&Explainer<'_>; 2],
    end: usize,
    [before, after]: [Said; 2],
    what: fn(String) -> What,
) {
    let gained = after.iter().filter(|(name, _)| !before.contains_key(*name));
    let lost = before.iter().filter(|(name, _)| !after.contains_key(*name));
    let gained = gained.map(|said| (true, new, said));
    for (gained, side, (name, line)) in gained.chain(lost.map(|said| (false, old, said))) {
        let rule = Rule {
            file: side.file(),
            line: *line,
            summary: String::new(),
        };
        let pairs = found.entry((gained, rule, what(name.clone()))).or_default();
        pairs.entry(end).or_default();
    }
}

fn approvals(side: &Explainer<'_>, node: &Node, routes: &BTreeSet<IpNet>) -> Said {
    let document = side.document;
    let offering = Node {
        advertised_routes: routes.clone(),
        ..node.clone()
    };
    let approved = auto_approved(document, &side.subjects, &offering).into_iter();
    let line = |net: IpNet| {
        let approvers = &document.auto_approvers;
        let first = |owners: &[Spanned<Selector>]| owners.first().map(|owner| owner.span);
        let span = match net.prefix_len() {
            0 => first(&approvers.exit_node),
            _ => {
                let routes = approvers.routes.iter();
                let mut around = routes.filter(|(route, _)| route.contains(&net));
                around.find_map(|(_, owners)| first(owners))
            }
        };
        document.lines.line(span.unwrap_or_default())
    };
    approved.map(|net| (net.to_string(), line(net))).collect()
}

/// The pool of new nodes with this one's owner, if the policy has one for them.
fn pool(side: &Explainer<'_>, node: &Node) -> Said {
    let from = allotment(side.document, &side.subjects, &node.owner);
    let nets: Vec<String> = from.nets.iter().map(ToString::to_string).collect();
    from.line
        .map(|line| (nets.join(", "), line))
        .into_iter()
        .collect()
}
