//! `ipsets`: named sets of addresses, made of addresses, hosts, the internet and each other.
//!
//! Sets may name sets, so a short text can describe a lot: depth and the number of prefixes that
//! all sets together come to are bounded, and each set is worked out once.

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::ground;
use super::ipset::IpSet;
use super::problem::Span;
use super::selector::{Autogroup, Selector};
use super::syntax::{Document, SetStep};
use crate::world::Pools;

/// How deep ip sets may be made of ip sets. A person does not follow more.
const DEEPEST: usize = 8;

/// How many prefixes all sets may come to, counted once for each set: about 64 MiB.
const MOST_PREFIXES: usize = 1 << 20;

pub(super) type IpSets = BTreeMap<String, IpSet>;

/// Why a set cannot be worked out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Endless {
    pub(super) span: Span,
    pub(super) message: String,
}

pub(super) fn resolve(document: &Document, pools: &Pools) -> Result<IpSets, Endless> {
    let mut builder = Builder {
        document,
        pools,
        done: IpSets::new(),
        prefixes: 0,
    };
    for (name, steps) in &document.ip_sets {
        builder.set(name, 0).map_err(|reason| Endless {
            span: steps.span,
            message: match reason {
                TooMuch::Depth => {
                    format!("{name} is made of itself, or of ip sets more than {DEEPEST} deep")
                }
                TooMuch::Prefixes => {
                    format!("the ip sets come to more than {MOST_PREFIXES} prefixes")
                }
            },
        })?;
    }
    Ok(builder.done)
}

enum TooMuch {
    Depth,
    Prefixes,
}

struct Builder<'a> {
    document: &'a Document,
    pools: &'a Pools,
    done: IpSets,
    prefixes: usize,
}

impl Builder<'_> {
    fn set(&mut self, name: &str, depth: usize) -> Result<(), TooMuch> {
        if self.done.contains_key(name) {
            return Ok(());
        }
        if depth > DEEPEST {
            return Err(TooMuch::Depth);
        }
        let document = self.document;
        let mut set = IpSet::default();
        // Steps of one kind in a row are one step, which keeps a long list linear.
        let mut pending: Vec<IpNet> = Vec::new();
        let mut adding = true;
        let steps = document.ip_sets.get(name).into_iter();
        for step in steps.flat_map(|steps| &steps.value) {
            let SetStep { adds, selector } = &step.value;
            if *adds != adding {
                set.alter(std::mem::take(&mut pending), adding);
                adding = *adds;
            }
            match selector {
                Selector::Prefix(net) => pending.push(*net),
                Selector::Host(host) => {
                    let host = document.hosts.get(host);
                    pending.extend(host.map(|host| host.value));
                }
                Selector::Autogroup(Autogroup::Internet) => {
                    pending.extend(ground::internet(self.pools).prefixes());
                }
                Selector::IpSet(inner) => {
                    self.set(inner, depth + 1)?;
                    let inner = self.done.get(inner);
                    pending.extend(inner.into_iter().flat_map(IpSet::prefixes));
                }
                _ => {}
            }
            if self.prefixes + pending.len() > MOST_PREFIXES {
                return Err(TooMuch::Prefixes);
            }
        }
        set.alter(pending, adding);
        self.prefixes += set.prefixes().len();
        self.done.insert(name.to_owned(), set);
        Ok(())
    }
}
