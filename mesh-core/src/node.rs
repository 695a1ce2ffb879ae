//! The nouns: nodes, users, tags, names, and the numbers that order them.
//!
//! Text from outside becomes one of these types at the door or is refused there, so that no later
//! code asks whether a name is safe to put into a DNS zone or a log line.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;

use crate::key::{MachinePublic, NodePublic};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// A node, for as long as the coordinator's database lives. Never used twice.
    NodeId
}
number! {
    /// A person.
    UserId
}
number! {
    /// How often the world has changed. Only grows within an [`Epoch`].
    Generation
}
number! {
    /// How often the world was restored from a backup. A greater epoch outranks every generation.
    Epoch
}
number! {
    /// Seconds since 1970-01-01 UTC, by the coordinator's clock.
    UnixTime
}

/// A mesh: sixteen random bytes, written in hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MeshId(pub [u8; 16]);

impl fmt::Display for MeshId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for MeshId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MeshId({self})")
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidName {
    #[error(
        "a node name is a DNS label of 1 to 63 of a-z, 0-9 and '-', not starting or ending with '-': {0:?}"
    )]
    Label(String),
    #[error("a tag is written \"tag:NAME\", NAME starting with a letter: {0:?}")]
    Tag(String),
    #[error("a user name is 1 to 254 printable characters without spaces: {0:?}")]
    User(String),
    #[error(
        "a role is one of owner, admin, network-admin, it-admin, billing-admin, auditor, member: {0:?}"
    )]
    Role(String),
    #[error(
        "an attribute is \"ip:country\" or \"custom:NAME\", NAME of 1 to 50 letters, digits and '_': {0:?}"
    )]
    Attribute(String),
}

/// A node's name in the mesh: one DNS label (RFC 1123, section 2.1), lower case.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

impl Name {
    /// The longest label that DNS carries (RFC 1035, section 2.3.4).
    pub const MAX: usize = 63;

    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        let fits = (1..=Self::MAX).contains(&text.len())
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !text.starts_with('-')
            && !text.ends_with('-');
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidName::Label(text.to_owned()))
        }
    }

    /// Makes a name of whatever a host calls itself: the first label, made DNS-safe.
    pub fn sanitize(hostname: &str) -> Self {
        let label = hostname.split('.').next().unwrap_or_default();
        let mut safe = String::new();
        for c in label.chars() {
            match c.to_ascii_lowercase() {
                c @ ('a'..='z' | '0'..='9') => safe.push(c),
                _ if !safe.ends_with('-') && !safe.is_empty() => safe.push('-'),
                _ => {}
            }
        }
        safe.truncate(Self::MAX);
        let safe = safe.trim_matches('-');
        Self(if safe.is_empty() {
            "node".to_owned()
        } else {
            safe.to_owned()
        })
    }

    /// `self`, or `self-1`, `self-2`, … : the first that `taken` does not hold.
    pub fn unique(&self, taken: &BTreeSet<Self>) -> Self {
        if !taken.contains(self) {
            return self.clone();
        }
        (1_u64..)
            .map(|n| {
                let suffix = format!("-{n}");
                let stem = &self.0[..self.0.len().min(Self::MAX - suffix.len())];
                Self(format!("{}{suffix}", stem.trim_end_matches('-')))
            })
            .find(|name| !taken.contains(name))
            .expect("a finite set cannot hold every number")
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The role of an unowned node, written `tag:NAME`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(String);

impl Tag {
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        let name = text.strip_prefix("tag:").unwrap_or_default();
        let fits = name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.len() <= 128
            && name
                .bytes()
                .all(|b| b.is_ascii_graphic() && !b"\",/*".contains(&b));
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidName::Tag(text.to_owned()))
        }
    }

    /// With the `tag:` in front, as policy writes it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A person's login name, an e-mail address as a rule: what policy means by `user@…`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UserName(String);

impl UserName {
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        let fits = (1..=254).contains(&text.len())
            && text.chars().all(|c| !c.is_control() && !c.is_whitespace());
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidName::User(text.to_owned()))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What a person may administer. Policy names those who hold a role by `autogroup:ROLE`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Role {
    Owner,
    Admin,
    NetworkAdmin,
    ItAdmin,
    BillingAdmin,
    Auditor,
    /// None of the others.
    #[default]
    Member,
}

impl Role {
    pub const ALL: [Self; 7] = [
        Self::Owner,
        Self::Admin,
        Self::NetworkAdmin,
        Self::ItAdmin,
        Self::BillingAdmin,
        Self::Auditor,
        Self::Member,
    ];

    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        let known = Self::ALL.into_iter().find(|role| role.as_str() == text);
        known.ok_or_else(|| InvalidName::Role(text.to_owned()))
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Owner => "owner",
            Self::Admin => "admin",
            Self::NetworkAdmin => "network-admin",
            Self::ItAdmin => "it-admin",
            Self::BillingAdmin => "billing-admin",
            Self::Auditor => "auditor",
            Self::Member => "member",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A posture attribute that the coordinator keeps: `custom:NAME`, set by an administrator, or
/// `ip:country`. What begins with `node:` comes from [`HostInfo`] and is no such name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttributeName(String);

impl AttributeName {
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        let custom = text.strip_prefix("custom:").is_some_and(|name| {
            (1..=50).contains(&name.len())
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        });
        if custom || text == "ip:country" {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidName::Attribute(text.to_owned()))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What an attribute can be.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum AttributeValue {
    /// Compared as a version where it is ordered: number by number, `1.10` after `1.9`.
    Text(String),
    Number(i64),
    Bool(bool),
}

impl fmt::Display for AttributeValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => text.fmt(f),
            Self::Number(number) => number.fmt(f),
            Self::Bool(value) => value.fmt(f),
        }
    }
}

macro_rules! text {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({:?})", stringify!($name), self.0)
            }
        }
    )*};
}
text!(Name, Tag, UserName, AttributeName);

/// A node's own two mesh addresses.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Addresses {
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
}

impl Addresses {
    pub fn each(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// Both as host prefixes, /32 and /128.
    pub fn prefixes(&self) -> [IpNet; 2] {
        self.each().map(IpNet::from)
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        self.each().contains(&address)
    }
}

/// Whom a node belongs to: a person, or nobody but its tags. Never both (Tailscale's rule).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Owner {
    User(UserId),
    Tags(BTreeSet<Tag>),
}

impl Owner {
    pub fn user(&self) -> Option<UserId> {
        match self {
            Self::User(user) => Some(*user),
            Self::Tags(_) => None,
        }
    }

    pub fn tags(&self) -> impl Iterator<Item = &Tag> {
        let tags = match self {
            Self::User(_) => None,
            Self::Tags(tags) => Some(tags),
        };
        tags.into_iter().flatten()
    }
}

/// What a node says about itself. Never trusted for a decision about others.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HostInfo {
    pub hostname: String,
    pub os: String,
    pub os_version: String,
    pub kernel: String,
    pub agent_version: String,
    /// `kernel` or `userspace`.
    pub backend: String,
}

/// An enrolled node, as the coordinator knows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    pub id: NodeId,
    pub name: Name,
    pub machine: MachinePublic,
    pub key: NodePublic,
    pub owner: Owner,
    pub addresses: Addresses,
    pub endpoints: BTreeSet<SocketAddr>,
    pub advertised_routes: BTreeSet<IpNet>,
    pub approved_routes: BTreeSet<IpNet>,
    pub ephemeral: bool,
    pub created: UnixTime,
    /// When the node key stops being honoured; `None` for nodes that do not expire, tagged ones as a rule.
    pub expires: Option<UnixTime>,
    /// The coordinator's clock passed `expires`: nobody sees the node and it sees nobody.
    pub expired: bool,
    pub host: HostInfo,
    /// What policy's postures may ask beside [`HostInfo`].
    pub attributes: BTreeMap<AttributeName, AttributeValue>,
}

impl Node {
    /// One that has reported nothing yet and stays until it is deleted.
    pub fn new(
        id: NodeId,
        name: Name,
        machine: MachinePublic,
        key: NodePublic,
        owner: Owner,
        addresses: Addresses,
    ) -> Self {
        Self {
            id,
            name,
            machine,
            key,
            owner,
            addresses,
            endpoints: BTreeSet::new(),
            advertised_routes: BTreeSet::new(),
            approved_routes: BTreeSet::new(),
            ephemeral: false,
            created: UnixTime(0),
            expires: None,
            expired: false,
            host: HostInfo::default(),
            attributes: BTreeMap::new(),
        }
    }

    /// Approved routes that the node still advertises, exit routes left out.
    pub fn serving_routes(&self) -> impl Iterator<Item = &IpNet> {
        self.approved_routes
            .intersection(&self.advertised_routes)
            .filter(|net| net.prefix_len() > 0)
    }

    /// Approved to route 0.0.0.0/0 or ::/0.
    pub fn is_exit_node(&self) -> bool {
        self.approved_routes
            .intersection(&self.advertised_routes)
            .any(|net| net.prefix_len() == 0)
    }
}

/// A person who may own nodes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct User {
    pub id: UserId,
    pub name: UserName,
    pub display_name: String,
    /// What the identity provider said at the last login; policy names them by `idp:NAME`.
    pub idp_groups: BTreeSet<String>,
    pub role: Role,
    pub created: UnixTime,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    #[test]
    fn hostnames_become_labels() {
        let check = |from: &str, to: &str| assert_eq!(Name::sanitize(from).as_str(), to);
        check("GPU-01.example.org", "gpu-01");
        check("my laptop (2)", "my-laptop-2");
        check("--", "node");
        check("", "node");
        check("bücher", "b-cher");
        check("../../etc/passwd", "node");
        check(&"a".repeat(80), &"a".repeat(63));
    }

    #[test]
    fn a_clash_gets_the_next_number() {
        let taken = BTreeSet::from([name("web"), name("web-1")]);
        assert_eq!(name("db").unique(&taken), name("db"));
        assert_eq!(name("web").unique(&taken), name("web-2"));
        let long = name(&"a".repeat(63));
        let next = long.unique(&BTreeSet::from([long.clone()]));
        assert_eq!(next.as_str(), format!("{}-1", "a".repeat(61)));
    }

    #[test]
    fn a_role_reads_back_as_it_prints() {
        for role in Role::ALL {
            assert_eq!(Role::parse(&role.to_string()), Ok(role));
        }
        assert!(Role::parse("root").is_err());
    }

    #[test]
    fn unsafe_names_are_refused() {
        for bad in [
            "",
            "A",
            "a_b",
            "-a",
            "a-",
            "a.b",
            "a\u{1b}[31m",
            "..",
            "a/b",
        ] {
            assert!(Name::parse(bad).is_err(), "{bad:?}");
        }
        for bad in ["", "tag:", "tag:1", "node", "tag:a b", "tag:a\n"] {
            assert!(Tag::parse(bad).is_err(), "{bad:?}");
        }
        for bad in ["custom:", "custom:a b", "node:os", "ip:city", "score"] {
            assert!(AttributeName::parse(bad).is_err(), "{bad:?}");
        }
    }
}
