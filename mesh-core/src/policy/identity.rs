//! Classes of addresses that policy cannot tell apart, and the numbers they go by.
//!
//! An address is judged by nothing but the set of selectors that it satisfies; that set, written
//! out, is the class. The number is a hash of the writing, so it stays the same from one compile
//! to the next without anybody remembering it.

use std::collections::BTreeMap;

use ipnet::IpNet;
use sha2::{Digest as _, Sha256};

use super::ipset::bounds;
use super::resolve::Extent;
use crate::node::{Node, NodeId, Tag, UserId};
use crate::{Identity, RuleId};

/// Index of a selector in the sorted list of all that the policy's rules use.
pub(super) type AtomId = usize;

/// One selector, and what it covers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Atom {
    /// Canonical text, the same in every compile.
    pub(super) text: String,
    pub(super) extent: Extent,
}

/// All selectors of a policy's rules, arranged so that an address finds its own quickly.
#[derive(Debug, Default)]
pub(super) struct Atoms {
    texts: Vec<String>,
    by_user: BTreeMap<UserId, Vec<AtomId>>,
    by_tag: BTreeMap<Tag, Vec<AtomId>>,
    by_node: BTreeMap<NodeId, Vec<AtomId>>,
    member: Vec<AtomId>,
    tagged: Vec<AtomId>,
    /// Every prefix that some set is made of, with those sets.
    cuts: BTreeMap<IpNet, Vec<AtomId>>,
}

impl Atoms {
    /// `atoms` in the order of their texts, each text once.
    pub(super) fn new(atoms: Vec<Atom>) -> Self {
        let mut all = Self::default();
        for (id, Atom { text, extent }) in atoms.into_iter().enumerate() {
            all.texts.push(text);
            match extent {
                Extent::Addresses(set) => {
                    for prefix in set.prefixes() {
                        all.cuts.entry(prefix).or_default().push(id);
                    }
                }
                Extent::Users(users) => {
                    for user in users {
                        all.by_user.entry(user).or_default().push(id);
                    }
                }
                Extent::Nodes(nodes) => {
                    for node in nodes {
                        all.by_node.entry(node).or_default().push(id);
                    }
                }
                Extent::Tag(tag) => all.by_tag.entry(tag).or_default().push(id),
                Extent::Member => all.member.push(id),
                Extent::Tagged => all.tagged.push(id),
            }
        }
        all
    }

    pub(super) fn id(&self, text: &str) -> Option<AtomId> {
        self.texts
            .binary_search_by(|known| known.as_str().cmp(text))
            .ok()
    }

    pub(super) fn text(&self, atom: AtomId) -> &str {
        &self.texts[atom]
    }

    /// Those that a node's own address satisfies: by its owner, and by the address itself.
    pub(super) fn of_address(&self, node: &Node, address: IpNet) -> Vec<AtomId> {
        let mut atoms = self.of_net(address);
        atoms.extend(self.by_node.get(&node.id).into_iter().flatten());
        if let Some(user) = node.owner.user() {
            atoms.extend(self.by_user.get(&user).into_iter().flatten());
            atoms.extend(&self.member);
        } else {
            atoms.extend(&self.tagged);
            for tag in node.owner.tags() {
                atoms.extend(self.by_tag.get(tag).into_iter().flatten());
            }
        }
        atoms.sort_unstable();
        atoms.dedup();
        atoms
    }

    /// Those that hold all of `net`. A set's prefixes are the widest that it is made of, so it is
    /// one of them, `net` itself or wider, that does.
    pub(super) fn of_net(&self, net: IpNet) -> Vec<AtomId> {
        let mut atoms: Vec<AtomId> = (0..=net.prefix_len())
            .filter_map(|length| self.cuts.get(&IpNet::new(net.addr(), length).ok()?.trunc()))
            .flatten()
            .copied()
            .collect();
        atoms.sort_unstable();
        atoms
    }

    /// `net` and what policy cuts out of it: looked up by longest prefix, each address has its own.
    pub(super) fn pieces(&self, net: IpNet) -> Vec<IpNet> {
        let mut pieces = vec![net];
        pieces.extend(
            self.cuts
                .range(within(net))
                .map(|(cut, _)| *cut)
                .filter(|cut| *cut != net),
        );
        pieces
    }
}

/// The keys of a map by prefix that lie within `net`: prefixes sort by address, then by length.
fn within(net: IpNet) -> impl std::ops::RangeBounds<IpNet> {
    let (_, last) = bounds(net);
    let last = match net {
        IpNet::V4(_) => std::net::Ipv4Addr::from(u32::try_from(last).unwrap_or(u32::MAX)).into(),
        IpNet::V6(_) => std::net::IpAddr::from(std::net::Ipv6Addr::from(last)),
    };
    net..=IpNet::from(last)
}

/// The number of each class, from its canonical key. A clash, which is rare among 2³² numbers,
/// goes to the next free number in the order of the keys.
pub(super) fn number(keys: &[String]) -> Vec<Identity> {
    let mut order: Vec<usize> = (0..keys.len()).collect();
    order.sort_by_key(|&index| &keys[index]);
    let mut taken = std::collections::BTreeSet::new();
    let mut numbers = vec![Identity::UNKNOWN; keys.len()];
    for index in order {
        let mut number = hash(&keys[index]).max(Identity::FIRST.0);
        while !taken.insert(number) {
            number = number.wrapping_add(1).max(Identity::FIRST.0);
        }
        numbers[index] = Identity(number);
    }
    numbers
}

/// The name of a rule that says `content` for the `occurrence`th time in its policy.
pub(super) fn rule_id(content: &str, occurrence: usize) -> RuleId {
    RuleId(hash(&format!("{occurrence}\n{content}")).max(1))
}

fn hash(text: &str) -> u32 {
    let [a, b, c, d, ..] = <[u8; 32]>::from(Sha256::digest(text.as_bytes()));
    u32::from_be_bytes([a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_depend_on_the_key_alone() {
        let keys = ["tag:a", "tag:b", ""].map(String::from);
        let [a, b, none] = number(&keys)[..] else {
            panic!("three keys, three numbers")
        };
        assert_eq!(number(&["tag:b".to_owned()]), [b]);
        assert!(a != b && b != none && none >= Identity::FIRST);
    }

    #[test]
    fn a_rule_said_twice_has_two_names() {
        assert_ne!(rule_id("a", 0), rule_id("a", 1));
        assert_eq!(rule_id("a", 0), rule_id("a", 0));
    }
}
