//! Whether a well-formed policy makes sense: names are defined, selectors stand where they may.
//!
//! Most of it is the reference's list of refusals. A policy that is refused here changes nothing:
//! the one that runs goes on running.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::problem::{Complaints, Problems, Span, Spanned};
use super::resolve::{Extent, Resolver, Subjects};
use super::selector::{Autogroup, Selector};
use super::syntax::{Clause, Document, Kind};
use super::{compile, ipsets, tests_block};
use crate::node::Tag;
use crate::world::Pools;

mod ssh;

/// Refuses what is undefined or makes no sense, and what the policy's own `tests` say is wrong.
pub fn check(document: &Document, subjects: &Subjects<'_>) -> Result<(), Problems> {
    let mut complaints = Complaints::default();
    let resolver = Resolver::new(document, subjects.pools);
    let mut logins: BTreeMap<String, usize> = BTreeMap::new();
    for user in subjects.users.values() {
        *logins.entry(user.name.as_str().to_lowercase()).or_default() += 1;
    }
    let names = Names {
        document,
        resolver,
        logins,
    };
    for members in document.groups.values() {
        for user in &members.value {
            names.defined(user, &mut complaints);
        }
    }
    let tag_owners = document.tag_owners.values();
    for owner in tag_owners.flat_map(|owners| &owners.value) {
        names.owner(owner, &mut complaints);
    }
    for step in document.ip_sets.values().flat_map(|steps| &steps.value) {
        let selector = Spanned {
            value: step.value.selector.clone(),
            span: step.span,
        };
        names.defined(&selector, &mut complaints);
    }
    if let Err(endless) = ipsets::resolve(document, subjects.pools) {
        complaints.add(endless.span, endless.message);
    }
    for posture in &document.default_posture {
        names.posture(posture, &mut complaints);
    }
    for clause in &document.clauses {
        names.clause(clause, &mut complaints);
    }
    for clause in &document.node_attributes {
        for target in &clause.target {
            names.defined(target, &mut complaints);
            attribute_target(target, &mut complaints);
        }
        for pool in &clause.ip_pool {
            ip_pool(pool, subjects, &mut complaints);
        }
    }
    let approvers = &document.auto_approvers;
    let routes = approvers.routes.iter().map(|(_, owners)| owners);
    for owner in routes.chain([&approvers.exit_node]).flatten() {
        names.owner(owner, &mut complaints);
    }
    for clause in &document.ssh {
        ssh::clause(&names, clause, &mut complaints);
    }
    prefixes(document, &names.resolver, &mut complaints);
    let tested = !document.tests.is_empty() || !document.ssh_tests.is_empty();
    if complaints.is_empty() && tested {
        let compiled = compile(document, subjects, None);
        tests_block::run(document, subjects, &compiled, &mut complaints);
        ssh::run_tests(document, subjects, &compiled, &mut complaints);
    }
    complaints.settle(&document.text)
}

struct Names<'a> {
    document: &'a Document,
    resolver: Resolver<'a>,
    /// How many users go by a login, in lower case.
    logins: BTreeMap<String, usize>,
}

impl Names<'_> {
    /// That what a selector names exists in the text, and that a user is nobody else's namesake.
    fn defined(&self, selector: &Spanned<Selector>, complaints: &mut Complaints) {
        let document = self.document;
        let message = match &selector.value {
            Selector::Tag(tag) if !document.tag_owners.contains_key(tag) => {
                format!("tag not found: \"{tag}\"; define it in \"tagOwners\"")
            }
            Selector::Group(name) if !document.groups.contains_key(name) => {
                format!("group not defined in policy: {name:?}; define it in \"groups\"")
            }
            Selector::Host(name) if !document.hosts.contains_key(name) => {
                format!("host not defined in policy: {name:?}; define it in \"hosts\"")
            }
            Selector::User(name) if self.named(&name.to_lowercase()) > 1 => {
                format!("multiple users found for {name:?}; write the whole login")
            }
            Selector::IpSet(name) if !document.ip_sets.contains_key(name) => {
                format!("ip set not defined in policy: {name:?}; define it in \"ipsets\"")
            }
            _ => return,
        };
        complaints.add(selector.span, message);
    }

    /// How many users a login means; `NAME@` means the user called NAME, too.
    fn named(&self, login: &str) -> usize {
        let short = login.strip_suffix('@');
        let known = [Some(login), short].into_iter().flatten();
        known.filter_map(|login| self.logins.get(login)).sum()
    }

    fn owner(&self, owner: &Spanned<Selector>, complaints: &mut Complaints) {
        self.defined(owner, complaints);
        if let Selector::Autogroup(
            Autogroup::Own | Autogroup::Internet | Autogroup::DangerAll | Autogroup::NonRoot,
        ) = owner.value
        {
            let message = format!("{} is nobody who could own or approve", owner.value);
            complaints.add(owner.span, message);
        }
    }

    fn clause(&self, clause: &Clause, complaints: &mut Complaints) {
        for src in &clause.src {
            if let Selector::Tag(tag) = &src.value
                && !self.document.tag_owners.contains_key(tag)
            {
                let message = format!("src=tag not found: \"{tag}\"; define it in \"tagOwners\"");
                complaints.add(src.span, message);
            } else {
                self.defined(src, complaints);
            }
            source(src, complaints);
        }
        for Spanned {
            value: target,
            span,
        } in &clause.dst
        {
            let dst = Spanned {
                value: target.selector.clone(),
                span: *span,
            };
            if let Selector::Tag(tag) = &dst.value
                && !self.document.tag_owners.contains_key(tag)
            {
                let message =
                    format!("dst=\"{tag}\": tag not found: \"{tag}\"; define it in \"tagOwners\"");
                complaints.add(dst.span, message);
            } else {
                self.defined(&dst, complaints);
            }
            destination(clause, &dst, complaints);
        }
        for via in &clause.via {
            self.via(via, complaints);
        }
        for posture in clause.posture.iter().flatten() {
            self.posture(posture, complaints);
        }
    }

    fn posture(&self, name: &Spanned<String>, complaints: &mut Complaints) {
        if !self.document.postures.contains_key(&name.value) {
            let message = format!(
                "posture not defined: {:?}; define it in \"postures\"",
                name.value
            );
            complaints.add(name.span, message);
        }
    }

    fn via(&self, via: &Spanned<Tag>, complaints: &mut Complaints) {
        if !self.document.tag_owners.contains_key(&via.value) {
            let message = format!(
                "tag \"{}\" not found; define it in \"tagOwners\"",
                via.value
            );
            complaints.add(via.span, message);
        }
    }
}

fn source(src: &Spanned<Selector>, complaints: &mut Complaints) {
    let Selector::Autogroup(autogroup) = &src.value else {
        return;
    };
    match autogroup {
        Autogroup::Own | Autogroup::Internet => complaints.add(
            src.span,
            format!("\"{}\" not valid on the src side of a rule", src.value),
        ),
        Autogroup::NonRoot => complaints.add(
            src.span,
            "autogroup not supported for ACL sources: autogroup:nonroot names logins of \"ssh\"",
        ),
        Autogroup::Member
        | Autogroup::Tagged
        | Autogroup::DangerAll
        | Autogroup::Role(_)
        | Autogroup::Shared => {}
    }
}

fn destination(clause: &Clause, dst: &Spanned<Selector>, complaints: &mut Complaints) {
    match &dst.value {
        Selector::Autogroup(Autogroup::DangerAll) => {
            complaints.add(dst.span, "cannot use autogroup:danger-all as a dst");
        }
        Selector::Autogroup(Autogroup::NonRoot) => complaints.add(
            dst.span,
            "autogroup not supported for ACL destinations: autogroup:nonroot names logins of \"ssh\"",
        ),
        Selector::Autogroup(Autogroup::Internet) if !clause.app.is_empty() => {
            complaints.add(dst.span, "cannot use app grants with autogroup:internet");
        }
        Selector::Autogroup(Autogroup::Own) => own(clause, dst.span, complaints),
        Selector::Prefix(net) if net.prefix_len() == 0 && clause.kind == Kind::Grant => {
            complaints.add(
                dst.span,
                format!(
                    "dst \"{net}\": to allow all IP addresses, use \"*\" or \"autogroup:internet\""
                ),
            );
        }
        _ => {}
    }
}

/// `autogroup:self` asks whose node the source is, so the sources must be people.
fn own(clause: &Clause, span: Span, complaints: &mut Complaints) {
    let people = |src: &Spanned<Selector>| match &src.value {
        Selector::User(_) | Selector::Domain(_) | Selector::Group(_) | Selector::Idp(_) => true,
        Selector::Autogroup(Autogroup::Member | Autogroup::Role(_) | Autogroup::Shared) => true,
        Selector::Any => clause.kind != Kind::Grant,
        _ => false,
    };
    if !clause.src.iter().all(people) {
        complaints.add(
            span,
            "autogroup:self can only be used with users, groups, or supported autogroups as src",
        );
    }
}

fn attribute_target(target: &Spanned<Selector>, complaints: &mut Complaints) {
    if let Selector::Autogroup(
        Autogroup::Own | Autogroup::Internet | Autogroup::DangerAll | Autogroup::NonRoot,
    ) = target.value
    {
        let message = format!(
            "nodeAttrs target does not support this autogroup: {}",
            target.value
        );
        complaints.add(target.span, message);
    }
}

/// Addresses within the default pool that mean something else: services, and the quad-100 resolver.
const RESERVED: [&str; 2] = ["100.100.0.0/24", "100.100.100.0/24"];

fn ip_pool(pool: &Spanned<IpNet>, subjects: &Subjects<'_>, complaints: &mut Complaints) {
    let net = pool.value;
    let mut reserved = RESERVED
        .iter()
        .filter_map(|text| text.parse::<IpNet>().ok());
    let services = IpNet::V4(Pools::reserved_v4());
    let overlaps = |other: IpNet| other.contains(&net) || net.contains(&other);
    if overlaps(services) || reserved.any(overlaps) {
        let message = format!("IPPool({net}): network within reserved range");
        complaints.add(pool.span, message);
    } else if !IpNet::V4(subjects.pools.v4).contains(&net) {
        let message = format!(
            "IPPool({net}): not within {}, the mesh's IPv4 addresses",
            subjects.pools.v4
        );
        complaints.add(pool.span, message);
    }
}

/// How many address prefixes the rules may be about: as many as the packet path can tell apart
/// behind routers.
const MOST_PREFIXES: usize = 16_384;

fn prefixes(document: &Document, resolver: &Resolver<'_>, complaints: &mut Complaints) {
    let mut seen = BTreeSet::new();
    let mut prefixes = 0;
    for clause in &document.clauses {
        let dst = clause.dst.iter().map(|dst| &dst.value.selector);
        for selector in clause.src.iter().map(|src| &src.value).chain(dst) {
            let literal = matches!(
                selector,
                Selector::Prefix(_) | Selector::Host(_) | Selector::IpSet(_)
            );
            if literal && seen.insert(selector) {
                prefixes += match resolver.extent(selector) {
                    Extent::Addresses(set) => set.prefixes().len(),
                    _ => 0,
                };
            }
        }
        if prefixes > MOST_PREFIXES {
            let message = format!(
                "the rules up to here are about more than {MOST_PREFIXES} address prefixes: name wider ones"
            );
            complaints.add(clause.span, message);
            return;
        }
    }
}
