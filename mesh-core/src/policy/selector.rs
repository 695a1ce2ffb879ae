//! Selectors: how policy names nodes, people and addresses.
//!
//! The order in which a text is tried is part of the language: an address before `*` before
//! anything with an `@` (a user), then the prefixes, and what is left without a colon is a host.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use super::ports::Ports;
use crate::node::{Role, Tag};

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Selector {
    /// `*`: as a source the mesh's own, as a destination everything.
    Any,
    Prefix(IpNet),
    /// A login, `NAME@…`.
    User(String),
    /// `user:*@DOMAIN`: everybody of one domain.
    Domain(String),
    /// With the `group:` in front.
    Group(String),
    /// `idp:NAME`: a group that the identity provider says the user is in.
    Idp(String),
    Tag(Tag),
    Autogroup(Autogroup),
    /// A name from `hosts`.
    Host(String),
    /// With the `ipset:` in front.
    IpSet(String),
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Autogroup {
    Member,
    Tagged,
    Own,
    Internet,
    DangerAll,
    NonRoot,
    /// Users in a role.
    Role(Role),
    /// People of other meshes to whom a node was shared. This mesh shares none.
    Shared,
}

const AUTOGROUPS: [(&str, Autogroup); 13] = [
    ("member", Autogroup::Member),
    ("tagged", Autogroup::Tagged),
    ("self", Autogroup::Own),
    ("internet", Autogroup::Internet),
    ("danger-all", Autogroup::DangerAll),
    ("nonroot", Autogroup::NonRoot),
    ("owner", Autogroup::Role(Role::Owner)),
    ("admin", Autogroup::Role(Role::Admin)),
    ("it-admin", Autogroup::Role(Role::ItAdmin)),
    ("network-admin", Autogroup::Role(Role::NetworkAdmin)),
    ("billing-admin", Autogroup::Role(Role::BillingAdmin)),
    ("auditor", Autogroup::Role(Role::Auditor)),
    ("shared", Autogroup::Shared),
];

impl Selector {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if let Some(net) = parse_prefix(text) {
            return net.map(Self::Prefix);
        }
        if text == "*" {
            return Ok(Self::Any);
        }
        if let Some(domain) = text.strip_prefix("user:*@") {
            return parse_domain(text, domain);
        }
        if text.contains('@') {
            return parse_user(text);
        }
        let Some((kind, name)) = text.split_once(':') else {
            return match text {
                "" => Err("an empty selector: name a user, group, tag, host or address".to_owned()),
                _ => Ok(Self::Host(text.to_owned())),
            };
        };
        let named = |make: fn(String) -> Self| match name {
            "" => Err(format!("{text:?} has no name after the colon")),
            _ => Ok(make(text.to_owned())),
        };
        match kind {
            "group" => named(Self::Group),
            "idp" => named(Self::Idp),
            "ipset" => named(Self::IpSet),
            "tag" => parse_tag(text).map(Self::Tag),
            "autogroup" => Autogroup::parse(name).map(Self::Autogroup),
            _ => Err(format!(
                "invalid alias format: {text:?}; use a user (with '@'), group:, tag:, autogroup:, ipset:, idp:, a host name or an address"
            )),
        }
    }
}

impl Autogroup {
    fn parse(name: &str) -> Result<Self, String> {
        // The hosted service takes the plural for the singular.
        let name = if name == "members" { "member" } else { name };
        AUTOGROUPS
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, autogroup)| *autogroup)
            .ok_or_else(|| {
                let known: Vec<&str> = AUTOGROUPS.iter().map(|(name, _)| *name).collect();
                format!(
                    "invalid autogroup: got \"autogroup:{name}\", must be one of {}",
                    known.join(", ")
                )
            })
    }
}

pub(super) fn parse_tag(text: &str) -> Result<Tag, String> {
    Tag::parse(text).map_err(|_| {
        format!("{text:?}: tag names must start with a letter, after 'tag:', and hold no spaces")
    })
}

/// `text` means everybody of `domain`.
fn parse_domain(text: &str, domain: &str) -> Result<Selector, String> {
    let odd = |c: char| c.is_control() || c.is_whitespace() || c == '@' || c == '*';
    match domain.is_empty() || domain.contains(odd) {
        true => Err(format!(
            "{text:?} names no domain: write \"user:*@example.com\""
        )),
        false => Ok(Selector::Domain(domain.to_owned())),
    }
}

fn parse_user(text: &str) -> Result<Selector, String> {
    let plain = text.chars().all(|c| !c.is_control() && !c.is_whitespace());
    if plain && text.len() <= 254 && !text.starts_with('@') {
        Ok(Selector::User(text.to_owned()))
    } else {
        Err(format!("{text:?} is not a user's login name"))
    }
}

/// `None` where the text does not look like an address at all, so that a host may have that name.
fn parse_prefix(text: &str) -> Option<Result<IpNet, String>> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(Ok(address.into()));
    }
    let (address, length) = text.split_once('/')?;
    let looks = address.parse::<IpAddr>().is_ok();
    let net = text.parse::<IpNet>();
    match (looks, net) {
        (true, Ok(net)) if !length.starts_with('+') => Some(Ok(net.trunc())),
        (true, _) => Some(Err(format!(
            "{text:?}: invalid prefix length, at most 32 for IPv4 and 128 for IPv6"
        ))),
        (false, _) => Some(Err(format!(
            "{text:?}: hostname contains invalid IP address"
        ))),
    }
}

/// Splits `HOST:PORTS` at its last colon. Brackets stand round an IPv6 address, or not at all.
pub(super) fn parse_destination(text: &str) -> Result<(Selector, Ports), String> {
    let text = text.trim();
    let (host, ports) = text
        .rsplit_once(':')
        .ok_or_else(|| format!("hostport must contain a colon: {text:?}; write \"HOST:PORTS\", ports being 22, 80-443, 22,80 or *"))?;
    if host.is_empty() || (ports.is_empty() && !host.contains(':')) {
        return Err(format!("{text:?}: write \"HOST:PORTS\""));
    }
    let selector = match host.strip_prefix('[') {
        None if host.contains(']') => return Err(bracketed(host)),
        None => Selector::parse(host)?,
        Some(rest) => {
            let (inside, after) = rest.split_once(']').ok_or_else(|| bracketed(host))?;
            let length = after.strip_prefix('/').map_or(after.is_empty(), |length| {
                !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit())
            });
            if !length || inside.parse::<std::net::Ipv6Addr>().is_err() {
                return Err(bracketed(host));
            }
            Selector::parse(&format!("{inside}{after}"))?
        }
    };
    // `tag:web` alone is a selector without ports, not a host called "tag".
    if let Selector::Host(kind) = &selector
        && ["tag", "group", "autogroup", "ipset", "idp"].contains(&kind.as_str())
    {
        return Err(format!(
            "{text:?} has no ports: write \"{text}:22\" or \"{text}:*\""
        ));
    }
    let ports = Ports::parse(ports).map_err(|error| format!("dst={text:?}: {error}"))?;
    Ok((selector, ports))
}

fn bracketed(host: &str) -> String {
    format!("square brackets are only valid around IPv6 addresses: {host:?}")
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Prefix(net) if net.prefix_len() == net.max_prefix_len() => net.addr().fmt(f),
            Self::Prefix(net) => net.fmt(f),
            Self::Domain(domain) => write!(f, "user:*@{domain}"),
            Self::User(name)
            | Self::Group(name)
            | Self::Idp(name)
            | Self::Host(name)
            | Self::IpSet(name) => f.write_str(name),
            Self::Tag(tag) => tag.fmt(f),
            Self::Autogroup(autogroup) => {
                let name = AUTOGROUPS
                    .iter()
                    .find(|(_, known)| known == autogroup)
                    .map_or("", |(name, _)| name);
                write!(f, "autogroup:{name}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_prints_as_it_was_written() {
        for text in [
            "*",
            "100.64.0.7",
            "10.0.0.0/8",
            "fd7a::1",
            "odin@example.com",
            "odin@",
            "user:*@example.com",
            "group:admins",
            "idp:ops",
            "tag:web",
            "autogroup:member",
            "autogroup:self",
            "autogroup:it-admin",
            "ipset:office",
            "webserver",
        ] {
            let selector = Selector::parse(text).unwrap();
            assert_eq!(selector.to_string(), text);
            assert_eq!(Selector::parse(&format!(" {text} ")), Ok(selector));
        }
    }

    #[test]
    fn what_is_no_selector_is_refused() {
        let check = |text: &str, fragment: &str| {
            let error = Selector::parse(text).unwrap_err();
            assert!(error.contains(fragment), "{text}: {error}");
        };
        check("", "empty selector");
        check("tag:1a", "must start with a letter");
        check("tag:", "must start with a letter");
        check("group:", "no name");
        check("autogroup:everyone", "must be one of member, tagged");
        check("svc:web", "invalid alias format");
        check("10.0.0.0/33", "invalid prefix length");
        check("10.0.0/8", "invalid IP address");
        check("o din@example.com", "not a user's login");
        check("user:*@", "names no domain");
        check("user:*@*", "names no domain");
    }

    #[test]
    fn host_bits_of_a_prefix_do_not_count() {
        let net = |text: &str| Selector::parse(text).unwrap().to_string();
        assert_eq!(net("10.1.2.3/8"), "10.0.0.0/8");
    }

    #[test]
    fn destinations_split_at_the_last_colon() {
        let check = |text: &str, host: &str, ports: &str| {
            let (selector, got) = parse_destination(text).unwrap();
            assert_eq!(
                (selector.to_string(), got.to_string()),
                (host.into(), ports.into())
            );
        };
        check("tag:web:22", "tag:web", "22");
        check("*:*", "*", "*");
        check("10.0.0.0/8:80,443", "10.0.0.0/8", "80,443");
        check("[fd7a::1]:80", "fd7a::1", "80");
        check("[fd7a::]/64:80-90", "fd7a::/64", "80-90");
        check("fd7a::1:80", "fd7a::1", "80");
        check("odin@example.com:*", "odin@example.com", "*");
    }

    #[test]
    fn destinations_without_ports_are_refused() {
        let check = |text: &str, fragment: &str| {
            let error = parse_destination(text).unwrap_err();
            assert!(error.contains(fragment), "{text}: {error}");
        };
        check("web", "must contain a colon");
        check("tag:web", "has no ports");
        check(
            "tag:web:ssh",
            "dst=\"tag:web:ssh\": port range \"ssh\": invalid first integer",
        );
        check("[10.0.0.1]:80", "square brackets");
        check("[fd7a::1:80", "square brackets");
        check(":80", "HOST:PORTS");
    }
}
