//! What an operator may change.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_core::node::{
    AttributeName, AttributeValue, Name, Node, NodeId, Owner, Role, Tag, UnixTime, User, UserId,
    UserName,
};
use mesh_core::policy::{self, Document, Problems, Subjects};
use mesh_core::world::World;

use super::{Fault, Refusal, expire_now, put_if_changed, routable};
use crate::preauth::{DEFAULT_LIFETIME, KeyId, MAX_LIFETIME, PreAuthKey};
use crate::store::PolicyText;
use crate::world::Draft;

// === nodes ===

/// A node by number, else by name: a node cannot name itself after another's number.
pub fn find_node(world: &World, text: &str) -> Result<Arc<Node>, Refusal> {
    let by_number = text
        .parse()
        .ok()
        .and_then(|id| world.nodes.get(&NodeId(id)));
    let by_name = || world.nodes.values().find(|node| node.name.as_str() == text);
    by_number.or_else(by_name).cloned().ok_or_else(|| {
        Refusal::new(
            Fault::NotFound,
            format!("no node is called {text:?}; `mesh-coordinator node list` shows them"),
        )
    })
}

/// Gives a node the name, made DNS-safe; a clash gets `-1`.
pub fn rename_node(draft: &mut Draft, node: &str, name: &str) -> Result<Arc<Node>, Refusal> {
    let node = find_node(draft.world(), node)?;
    if !name.contains(|c: char| c.is_ascii_alphanumeric()) {
        return Err(Refusal::new(
            Fault::Invalid,
            format!("a name needs a letter or a digit: {name:?}"),
        ));
    }
    let mut taken = draft.world().names();
    taken.remove(&node.name);
    let name = Name::sanitize(name).unique(&taken);
    Ok(put_if_changed(draft, &node, |node| node.name = name))
}

/// Makes the node belong to its tags; its person, if any, no longer owns it.
pub fn tag_node(draft: &mut Draft, node: &str, tags: &[String]) -> Result<Arc<Node>, Refusal> {
    let node = find_node(draft.world(), node)?;
    let tags = parse_tags(tags)?;
    if tags.is_empty() {
        return Err(Refusal::new(
            Fault::Invalid,
            "a node belongs to a user or to at least one tag: name a tag",
        ));
    }
    Ok(put_if_changed(draft, &node, |node| {
        if node.owner.user().is_some() && !node.expired {
            node.expires = None;
        }
        node.owner = Owner::Tags(tags);
    }))
}

/// Replaces the routes that the node may serve. Approving what it does not offer yet is allowed.
pub fn approve_routes(
    draft: &mut Draft,
    node: &str,
    routes: &[String],
) -> Result<Arc<Node>, Refusal> {
    let node = find_node(draft.world(), node)?;
    let pools = draft.world().mesh.pools;
    let routes = routes.iter().map(|text| {
        let net: IpNet = text.parse().map_err(|_| {
            Refusal::new(
                Fault::Invalid,
                format!("not a prefix like 10.0.0.0/8: {text:?}"),
            )
        })?;
        if net != net.trunc() {
            let net = net.trunc();
            let words = format!("{text} has host bits set; did you mean {net}?");
            return Err(Refusal::new(Fault::Invalid, words));
        }
        if routable(&net, &pools) {
            Ok(net)
        } else {
            let words = format!(
                "{text} overlaps the mesh's own addresses, or is of loopback, link-local, multicast or IPv4-mapped ones"
            );
            Err(Refusal::new(Fault::Invalid, words))
        }
    });
    let routes = routes.collect::<Result<BTreeSet<IpNet>, Refusal>>()?;
    Ok(put_if_changed(draft, &node, |node| {
        node.approved_routes = routes;
    }))
}

pub fn expire_node(draft: &mut Draft, node: &str) -> Result<Arc<Node>, Refusal> {
    let node = find_node(draft.world(), node)?;
    Ok(expire_now(draft, &node))
}

pub fn delete_node(draft: &mut Draft, node: &str) -> Result<Arc<Node>, Refusal> {
    let node = find_node(draft.world(), node)?;
    draft.delete_node(node.id);
    Ok(node)
}

/// Sets a posture attribute, or takes it away. Whom policy lets in is judged again at once.
pub fn set_attribute(
    draft: &mut Draft,
    node: &str,
    name: &str,
    value: Option<AttributeValue>,
) -> Result<Arc<Node>, Refusal> {
    let node = find_node(draft.world(), node)?;
    let name = AttributeName::parse(name)
        .map_err(|invalid| Refusal::new(Fault::Invalid, invalid.to_string()))?;
    if let Some(AttributeValue::Text(text)) = &value
        && (text.chars().count() > LONGEST_ATTRIBUTE || text.contains(char::is_control))
    {
        let words = format!("a value has at most {LONGEST_ATTRIBUTE} printable characters");
        return Err(Refusal::new(Fault::Invalid, words));
    }
    if value.is_some()
        && !node.attributes.contains_key(&name)
        && node.attributes.len() >= MOST_ATTRIBUTES
    {
        let words = format!("a node has at most {MOST_ATTRIBUTES} attributes");
        return Err(Refusal::new(Fault::Exhausted, words));
    }
    Ok(put_if_changed(draft, &node, |node| match value {
        Some(value) => drop(node.attributes.insert(name, value)),
        None => drop(node.attributes.remove(&name)),
    }))
}

/// Posture attributes are switches and versions, not documents.
const LONGEST_ATTRIBUTE: usize = 128;
const MOST_ATTRIBUTES: usize = 64;

fn parse_tags(tags: &[String]) -> Result<BTreeSet<Tag>, Refusal> {
    let parse = |tag: &String| {
        Tag::parse(tag).map_err(|invalid| Refusal::new(Fault::Invalid, invalid.to_string()))
    };
    tags.iter().map(parse).collect()
}

// === users ===

pub fn find_user(world: &World, text: &str) -> Result<Arc<User>, Refusal> {
    let by_name = world.users.values().find(|user| user.name.as_str() == text);
    let by_number = || world.users.get(&UserId(text.parse().ok()?));
    by_name.or_else(by_number).cloned().ok_or_else(|| {
        Refusal::new(
            Fault::NotFound,
            format!("no user is called {text:?}; `mesh-coordinator user list` shows them"),
        )
    })
}

fn free_user_name(world: &World, text: &str) -> Result<UserName, Refusal> {
    let name = UserName::parse(text)
        .map_err(|invalid| Refusal::new(Fault::Invalid, invalid.to_string()))?;
    if world.users.values().any(|user| user.name == name) {
        let words = format!("a user is called {name:?} already");
        return Err(Refusal::new(Fault::Exists, words));
    }
    Ok(name)
}

pub fn create_user(
    draft: &mut Draft,
    name: &str,
    display_name: &str,
    role: &str,
) -> Result<Arc<User>, Refusal> {
    let name = free_user_name(draft.world(), name)?;
    let role = match role {
        "" => Role::default(),
        role => parse_role(role)?,
    };
    let user = User {
        id: UserId(draft.next_id()),
        name,
        display_name: printable(display_name),
        idp_groups: BTreeSet::new(),
        role,
        created: draft.now,
    };
    Ok(draft.put_user(user))
}

fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(128).collect()
}

fn parse_role(text: &str) -> Result<Role, Refusal> {
    Role::parse(text).map_err(|invalid| Refusal::new(Fault::Invalid, invalid.to_string()))
}

/// What is to change of a user; `None` stays.
#[derive(Debug, Clone, Default)]
pub struct UserChange {
    pub role: Option<String>,
    pub idp_groups: Option<Vec<String>>,
    pub display_name: Option<String>,
}

pub fn set_user(draft: &mut Draft, user: &str, change: UserChange) -> Result<Arc<User>, Refusal> {
    let user = find_user(draft.world(), user)?;
    let mut next = user.as_ref().clone();
    if let Some(role) = &change.role {
        next.role = parse_role(role)?;
    }
    if let Some(groups) = change.idp_groups {
        let odd = |group: &&String| {
            group.is_empty() || group.len() > 128 || group.contains(char::is_control)
        };
        if let Some(odd) = groups.iter().find(odd) {
            let words = format!("a group's name is 1 to 128 printable characters: {odd:?}");
            return Err(Refusal::new(Fault::Invalid, words));
        }
        let bare = groups
            .iter()
            .map(|group| group.trim_start_matches("idp:").to_owned());
        next.idp_groups = bare.collect();
    }
    if let Some(name) = change.display_name {
        next.display_name = printable(&name);
    }
    if next == *user {
        return Ok(user);
    }
    Ok(draft.put_user(next))
}

pub fn rename_user(draft: &mut Draft, user: &str, name: &str) -> Result<Arc<User>, Refusal> {
    let user = find_user(draft.world(), user)?;
    if user.name.as_str() == name {
        return Ok(user);
    }
    let name = free_user_name(draft.world(), name)?;
    Ok(draft.put_user(User {
        name,
        ..user.as_ref().clone()
    }))
}

/// Takes the user's pre-auth keys along; refuses while the user owns nodes.
pub fn delete_user(draft: &mut Draft, user: &str) -> Result<(), Refusal> {
    let user = find_user(draft.world(), user)?;
    let owned = |node: &&Arc<Node>| node.owner.user() == Some(user.id);
    let owned = draft.world().nodes.values().filter(owned).count();
    if owned > 0 {
        let words = format!(
            "{} owns {owned} node(s); delete or tag them first (`mesh-coordinator node list`)",
            user.name
        );
        return Err(Refusal::new(Fault::Precondition, words));
    }
    let theirs = |key: &&Arc<PreAuthKey>| key.owner.user() == Some(user.id);
    let keys: Vec<KeyId> = draft
        .keys()
        .values()
        .filter(theirs)
        .map(|key| key.id)
        .collect();
    for key in keys {
        draft.delete_key(key);
    }
    draft.delete_user(user.id);
    Ok(())
}

// === pre-auth keys ===

/// What is asked of a new key.
#[derive(Debug, Clone)]
pub struct KeyRequest {
    pub prefix: String,
    pub hash: [u8; 32],
    pub reusable: bool,
    pub ephemeral: bool,
    /// In seconds; one hour when nobody says.
    pub lifetime: Option<u64>,
    pub tags: Vec<String>,
    pub user: Option<String>,
}

pub fn create_key(draft: &mut Draft, request: KeyRequest) -> Result<Arc<PreAuthKey>, Refusal> {
    let tags = parse_tags(&request.tags)?;
    let owner = match (&request.user, tags.is_empty()) {
        (Some(user), true) => Owner::User(find_user(draft.world(), user)?.id),
        (None, false) => Owner::Tags(tags),
        (Some(_), false) => {
            return Err(Refusal::new(
                Fault::Invalid,
                "a node with tags has no user: give --tag or --user, not both",
            ));
        }
        (None, true) => {
            return Err(Refusal::new(
                Fault::Invalid,
                "say whose nodes the key makes: --tag tag:NAME, or --user NAME",
            ));
        }
    };
    let lifetime = request.lifetime.unwrap_or(DEFAULT_LIFETIME);
    if !(1..=MAX_LIFETIME).contains(&lifetime) {
        return Err(Refusal::new(
            Fault::Invalid,
            "a key lives between one second and ninety days",
        ));
    }
    let key = PreAuthKey {
        id: KeyId(draft.next_id()),
        prefix: request.prefix,
        hash: request.hash,
        reusable: request.reusable,
        ephemeral: request.ephemeral,
        owner,
        created: draft.now,
        expires: UnixTime(draft.now.0 + lifetime),
        revoked: false,
        uses: 0,
        last_node: None,
    };
    Ok(draft.put_key(key))
}

/// A revoked key stays in the list; nodes that it enrolled stay nodes.
pub fn revoke_key(draft: &mut Draft, id: KeyId) -> Result<Arc<PreAuthKey>, Refusal> {
    let Some(key) = draft.keys().get(&id).cloned() else {
        let words = format!(
            "no key has number {}; `mesh-coordinator key list` shows them",
            id.0
        );
        return Err(Refusal::new(Fault::NotFound, words));
    };
    if key.revoked {
        return Ok(key);
    }
    Ok(draft.put_key(PreAuthKey {
        revoked: true,
        ..key.as_ref().clone()
    }))
}

/// Useless for a month: not even worth a line in the list.
pub fn is_forgotten(key: &PreAuthKey, now: UnixTime) -> bool {
    const MONTH: u64 = 30 * 24 * 3600;
    key.expires.0 + MONTH < now.0
}

pub fn forget_keys(draft: &mut Draft) {
    let now = draft.now;
    let old = |key: &&Arc<PreAuthKey>| is_forgotten(key, now);
    let old: Vec<KeyId> = draft
        .keys()
        .values()
        .filter(old)
        .map(|key| key.id)
        .collect();
    for id in old {
        draft.delete_key(id);
    }
}

// === policy ===

/// Reads and checks a policy against the world as it is.
pub fn check_policy(world: &World, text: &str, file: &str) -> Result<Document, Problems> {
    let named = |problems: Problems| problems.in_file(file);
    let document = Document::parse(text).map_err(named)?;
    policy::check(&document, &Subjects::from(world)).map_err(named)?;
    Ok(document)
}

/// A text to be put in force.
#[derive(Debug, Clone, Default)]
pub struct NewPolicy {
    pub text: String,
    /// As the operator named it, directories and all.
    pub file: String,
    pub author: String,
    /// Refuse where another version is in force.
    pub expect: Option<u64>,
}

/// Replaces the policy, or changes nothing.
pub fn set_policy(draft: &mut Draft, new: NewPolicy) -> Result<Arc<PolicyText>, Refusal> {
    let NewPolicy {
        text,
        file,
        author,
        expect,
    } = new;
    let version = draft.policy().map_or(0, |policy| policy.version);
    if let Some(expect) = expect
        && expect != version
    {
        let words =
            format!("the policy is at version {version} by now, not {expect}; look at it again");
        return Err(Refusal::new(Fault::Precondition, words));
    }
    let document = check_policy(draft.world(), &text, &file)
        .map_err(|problems| Refusal::new(Fault::Invalid, problems.to_string()))?;
    // Every node is told the name; where the file lies on an operator's disk is not their business.
    let name = file.rsplit('/').next().unwrap_or_default();
    let policy = PolicyText {
        version: version + 1,
        text,
        changed: draft.now,
        file: name.to_owned(),
        author,
    };
    let document = document.in_file(policy.shown_file());
    Ok(draft.put_policy(policy, Arc::new(document)))
}
