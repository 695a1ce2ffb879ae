//! Questions about whom nobody is yet: a tag, a user, a group without a node.
//!
//! An operator asks before the first machine of a tag is enrolled. The policy has an answer to that
//! already, so it is asked of a world that has one such node more, compiled from the one that is.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::ends::{Explainer, Service, Unanswerable};
use super::shown::{Answer, Way};
use crate::ipam;
use crate::key::{MachinePublic, NodePublic};
use crate::node::{Name, Node, NodeId, Owner, Role, UnixTime, User, UserId, UserName};
use crate::policy::compile::{CompiledPolicy, compile};
use crate::policy::pools::allotment;
use crate::policy::resolve::Subjects;
use crate::policy::selector::{Autogroup, Selector};
use crate::policy::syntax::Document;
use crate::world::World;

/// What people ask of a policy; ends are named as they name them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Question<'a> {
    Explain { src: &'a str, dst: &'a str },
    WhoCan { dst: &'a str },
    WhatCan { src: &'a str },
}

impl<'a> Question<'a> {
    fn ends(self) -> Result<Vec<&'a str>, Unanswerable> {
        Ok(match self {
            Self::Explain { src, dst } => vec![src, Service::parse(dst)?.host],
            Self::WhoCan { dst } => vec![Service::parse(dst)?.host],
            Self::WhatCan { src } => vec![src],
        })
    }
}

/// Answers a question about a policy, of which `compiled` was made in this world.
pub fn ask(
    world: &World,
    document: &Document,
    compiled: &CompiledPolicy,
    question: Question<'_>,
) -> Result<Answer, Unanswerable> {
    let explainer = Explainer::new(world, document, compiled);
    let mut imagined = world.clone();
    let mut notes = Vec::new();
    for end in question.ends()? {
        if let Err(Unanswerable::Unknown(why)) = explainer.ends(end)
            && let Ok(selector) = Selector::parse(end)
            && imagine(&mut imagined, document, &selector)
        {
            notes.push(format!("{why} now: this is about an imagined one"));
        }
    }
    if notes.is_empty() {
        return explainer.answer(question);
    }
    let compiled = compile(document, &Subjects::from(&imagined), Some(compiled));
    let mut answer = Explainer::new(&imagined, document, &compiled).answer(question)?;
    notes.dedup();
    answer.json["imagined"] = notes.as_slice().into();
    answer.lines.splice(0..0, notes);
    Ok(answer)
}

impl Explainer<'_> {
    fn answer(&self, question: Question<'_>) -> Result<Answer, Unanswerable> {
        Ok(match question {
            Question::Explain { src, dst } => self.explain(src, dst)?.into(),
            Question::WhoCan { dst } => self.who_can(dst)?.answer(Way::WhoCan),
            Question::WhatCan { src } => self.what_can(src)?.answer(Way::WhatCan),
        })
    }
}

/// Puts a node into the world that the selector means. `false` where it does not say whose.
fn imagine(world: &mut World, document: &Document, selector: &Selector) -> bool {
    match selector {
        Selector::Tag(tag) if document.tag_owners.contains_key(tag) => {
            add(world, document, Owner::Tags([tag.clone()].into()))
        }
        Selector::Group(name) => {
            let members = document.groups.get(name).into_iter();
            let mut any = false;
            for member in members.flat_map(|members| &members.value) {
                any |= imagine(world, document, &member.value);
            }
            any
        }
        Selector::User(login) => {
            let login = login.strip_suffix('@').unwrap_or(login);
            owned(world, document, login, |_| {})
        }
        Selector::Domain(domain) => owned(world, document, &format!("somebody@{domain}"), |_| {}),
        Selector::Idp(group) => owned(world, document, SOMEBODY, |user| {
            let group = group.strip_prefix("idp:").unwrap_or(group);
            user.idp_groups.insert(group.to_owned());
        }),
        Selector::Autogroup(Autogroup::Role(role)) => {
            owned(world, document, SOMEBODY, |user| user.role = *role)
        }
        Selector::Autogroup(Autogroup::Member) => owned(world, document, SOMEBODY, |_| {}),
        _ => false,
    }
}

const SOMEBODY: &str = "somebody";

/// A node of the user who goes by a login, who is imagined too where there is none.
fn owned(world: &mut World, document: &Document, login: &str, be: impl FnOnce(&mut User)) -> bool {
    let same = |user: &&Arc<User>| user.name.as_str().eq_ignore_ascii_case(login);
    let known = world.users.values().find(same).map(|user| user.id);
    let id = match (known, UserName::parse(login)) {
        (Some(id), _) => id,
        (None, Err(_)) => return false,
        (None, Ok(name)) => {
            let last = world.users.last_key_value();
            let id = UserId(last.map_or(0, |(id, _)| id.0) + 1);
            let mut user = User {
                id,
                name,
                display_name: String::new(),
                idp_groups: BTreeSet::new(),
                role: Role::default(),
                created: UnixTime(0),
            };
            be(&mut user);
            world.users.insert(id, Arc::new(user));
            id
        }
    };
    add(world, document, Owner::User(id))
}

/// A node that has reported nothing.
fn add(world: &mut World, document: &Document, owner: Owner) -> bool {
    let from = allotment(document, &Subjects::from(&*world), &owner);
    let taken = world.nodes.values().map(|node| node.addresses.v4);
    let Ok(addresses) = ipam::allocate(&world.mesh.pools, &from.nets, &taken.collect()) else {
        return false;
    };
    let last = world.nodes.last_key_value();
    let id = NodeId(last.map_or(0, |(id, _)| id.0) + 1);
    let node = Node::new(
        id,
        Name::sanitize("imagined").unique(&world.names()),
        MachinePublic([0; 32]),
        NodePublic([0; 32]),
        owner,
        addresses,
    );
    world.nodes.insert(id, Arc::new(node));
    true
}
