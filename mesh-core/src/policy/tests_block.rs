//! Runs a policy's own `tests` against what it compiles to.
//!
//! As in the reference, a source reaches where each of its addresses reaches one of the destination's;
//! what is denied to one of them is not accepted. Whoever resolves to nobody fails: a test that
//! checks nothing would be worse than none.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::classes::{Class, Key};
use super::compile::CompiledPolicy;
use super::entries::Answer;
use super::ports::{self, DEFAULT_PROTOCOLS, Protocol};
use super::problem::{Complaints, Spanned};
use super::resolve::{Extent, Resolver, Subjects};
use super::selector::{self, Autogroup, Selector};
use super::syntax::{Document, Test};
use crate::netmap::{Action, PortRange};

pub(super) fn run(
    document: &Document,
    subjects: &Subjects<'_>,
    compiled: &CompiledPolicy,
    complaints: &mut Complaints,
) {
    let runner = Runner {
        document,
        resolver: Resolver::new(document, subjects.pools),
        subjects: *subjects,
        compiled,
        seen: RefCell::default(),
    };
    for test in &document.tests {
        runner.test(test, complaints);
    }
}

struct Runner<'a> {
    document: &'a Document,
    resolver: Resolver<'a>,
    subjects: Subjects<'a>,
    compiled: &'a CompiledPolicy,
    seen: RefCell<Seen>,
}

/// What was found out for one test serves the others: policies have few kinds of ends, and tests
/// name the same ones over and over.
#[derive(Default)]
struct Seen {
    keys: BTreeMap<Key, usize>,
    classes: Vec<Class>,
    by_address: BTreeMap<IpAddr, usize>,
    by_selector: BTreeMap<Selector, Vec<IpAddr>>,
    answers: BTreeMap<(usize, usize), Vec<Answer>>,
}

impl Runner<'_> {
    fn test(&self, test: &Test, complaints: &mut Complaints) {
        if test.accept.is_empty() && test.deny.is_empty() {
            complaints.add(
                test.span,
                "test(s) failed: this test asks nothing; give it \"accept\" or \"deny\"",
            );
        }
        let src = Selector::parse(&test.src.value).and_then(|src| match self.addresses(&src) {
            addresses if addresses.is_empty() => {
                Err(format!("{:?} resolves to no address", test.src.value))
            }
            addresses => Ok(addresses),
        });
        let src = match src {
            Ok(src) => src,
            Err(error) => {
                complaints.add(test.src.span, format!("test(s) failed: src: {error}"));
                return;
            }
        };
        let expected = [(&test.accept, Action::Accept), (&test.deny, Action::Deny)];
        for (destinations, action) in expected {
            for dst in destinations {
                if let Err(error) = self.expect(&src, dst, test.protocol, action) {
                    let message = format!("test(s) failed: {} -> {error}", test.src.value);
                    complaints.add(dst.span, message);
                }
            }
        }
    }

    fn expect(
        &self,
        src: &[IpAddr],
        dst: &Spanned<String>,
        protocol: Protocol,
        action: Action,
    ) -> Result<(), String> {
        let text = &dst.value;
        let (selector, ports) = selector::parse_destination(text)?;
        let port = ports
            .single()
            .ok_or_else(|| format!("{text}: a test asks about one port"))?;
        // A CIDR is refused even where it holds one address only, as the hosted service does.
        let slash = text.contains('/');
        let several = match &selector {
            Selector::Any | Selector::Autogroup(Autogroup::Internet | Autogroup::Own) => true,
            Selector::Prefix(_) => slash,
            Selector::Host(name) => self
                .document
                .hosts
                .get(name)
                .is_some_and(|host| host.value.prefix_len() < host.value.max_prefix_len()),
            _ => false,
        };
        if several {
            return Err(format!("{text}: a test asks about one host, not a range"));
        }
        let dst = self.addresses(&selector);
        if dst.is_empty() {
            return Err(format!("{text}: resolves to no address"));
        }
        let reaches = |src: &IpAddr| {
            let mut dst = dst.iter();
            dst.any(|dst| self.reaches(*src, *dst, protocol, port))
        };
        match (src.iter().find(|src| !reaches(src)), action) {
            (Some(src), Action::Accept) => Err(format!("{text}: is not accepted from {src}")),
            (None, Action::Deny) => Err(format!("{text}: is accepted")),
            (None, Action::Accept) | (Some(_), Action::Deny) => Ok(()),
        }
    }

    /// Without a protocol, any of the four defaults will do.
    fn reaches(&self, src: IpAddr, dst: IpAddr, protocol: Protocol, port: u16) -> bool {
        let seen = &mut *self.seen.borrow_mut();
        let [src, dst] = [src, dst].map(|address| self.class(address, seen));
        let answers = seen.answers.entry((src, dst)).or_insert_with(|| {
            let (src, dst) = (&seen.classes[src], &seen.classes[dst]);
            self.compiled.rules.answers(src, dst)
        });
        let rules = &self.compiled.rules;
        answers.iter().any(|answer| {
            let asked = match protocol {
                Some(protocol) => answer.protocol == protocol,
                None => DEFAULT_PROTOCOLS.contains(&answer.protocol),
            };
            // What has no ports is asked for only where a rule says so itself: an echo, and ICMP as
            // a whole, go with rules about any port.
            let said = ports::has_ports(Some(answer.protocol))
                || (answer.ports == PortRange::ALL && rules.all[answer.rule].names_icmp);
            asked && said && answer.ports.contains(port) && answer.action == Action::Accept
        })
    }

    fn class(&self, address: IpAddr, seen: &mut Seen) -> usize {
        if let Some(class) = seen.by_address.get(&address) {
            return *class;
        }
        let key = self.compiled.key_of(address);
        let class = *seen.keys.entry(key).or_insert_with_key(|key| {
            seen.classes.push(self.compiled.class_of(key));
            seen.classes.len() - 1
        });
        seen.by_address.insert(address, class);
        class
    }

    /// Of the nodes' addresses that a selector means, one of each class and family; of a literal,
    /// its own.
    fn addresses(&self, selector: &Selector) -> Vec<IpAddr> {
        let seen = &mut *self.seen.borrow_mut();
        if let Some(known) = seen.by_selector.get(selector) {
            return known.clone();
        }
        let mut different = BTreeSet::new();
        let mut addresses = self.all_addresses(selector);
        addresses
            .retain(|address| different.insert((self.class(*address, seen), address.is_ipv4())));
        seen.by_selector.insert(selector.clone(), addresses.clone());
        addresses
    }

    fn all_addresses(&self, selector: &Selector) -> Vec<IpAddr> {
        match self.resolver.extent(selector) {
            Extent::Addresses(set)
                if matches!(selector, Selector::Prefix(_) | Selector::Host(_)) =>
            {
                set.prefixes().iter().map(IpNet::addr).collect()
            }
            extent => {
                let extent = &extent;
                let nodes = self.subjects.nodes.values().filter(|node| !node.expired);
                nodes
                    .flat_map(|node| {
                        let user = self.compiled.user_of(node);
                        let owned = extent.owns(&node.owner, user);
                        let meant = move |address: &IpAddr| {
                            owned || extent.holds((*address).into(), &self.compiled.ground)
                        };
                        node.addresses.each().into_iter().filter(meant)
                    })
                    .collect()
            }
        }
    }
}
