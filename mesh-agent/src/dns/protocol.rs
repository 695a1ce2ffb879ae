//! What the agent and the root helper say to each other: one line there, one line back.
//!
//! The helper is root and believes nobody, so a line is short, holds only what is listed here, and
//! every word of it is parsed into a type that cannot hold a line break. A connection is also a
//! lease: when it ends, the helper restores what it found.
//!
//! ```text
//! set INTERFACE DOMAIN SERVER[,SERVER…] ROUTING[,ROUTING…]   ->  ok MODE UPSTREAM[,UPSTREAM…]
//! restore                                                    ->  ok none UPSTREAM[,UPSTREAM…]
//! status                                                     ->  ok MODE UPSTREAM[,UPSTREAM…]
//!                                                                error WORDS
//! ```

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use mesh_core::dns::Domain;
use mesh_core::node::Name;

/// Longest line, its end included. The longest honest one has some 700 octets.
pub const MAX_LINE: usize = 1024;

/// glibc reads three name servers and no more (resolv.conf(5), MAXNS).
pub const MAX_SERVERS: usize = 3;

/// The mesh domain and two reverse zones, with some room.
pub const MAX_ROUTING: usize = 8;

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    Set(Setting),
    Restore,
    Status,
}

/// What the host's resolver should be told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Setting {
    pub interface: Interface,
    pub domain: Domain,
    pub servers: Vec<IpAddr>,
    /// Names that only these servers know, for resolvers that can tell.
    pub routing: Vec<ZoneName>,
}

/// A network interface's name, as far as we give and accept such names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Interface(String);

/// Labels joined by dots: a domain, or a zone under arpa.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ZoneName(String);

/// How the host's resolver was told, or `None` when it was not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    None,
    /// By `resolvectl`, for our interface alone.
    Resolved,
    /// As one more source of resolvconf's.
    Resolvconf,
    /// Another file stands in the place of resolv.conf.
    Replaced,
    /// The file itself holds other lines, since nothing can be put in its place.
    InPlace,
}

/// What the helper did or found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    pub mode: Mode,
    /// Who answered the host before, as resolv.conf spells it: an address, perhaps with `%zone`.
    pub upstreams: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("a request is one line of at most {MAX_LINE} octets of printable ASCII")]
    Line,
    #[error("there are three requests: set, restore and status")]
    Verb,
    #[error("set takes an interface, a domain, servers and routing domains")]
    Words,
    #[error(
        "an interface name is 1 to 15 letters, digits, '.', '_' and '-', not starting with those three"
    )]
    Interface,
    #[error("not a mesh domain")]
    Domain,
    #[error("a server is an IP address that a host can be asked at, and there are 1 to 3 of them")]
    Server,
    #[error("a routing domain is labels joined by dots, and there are at most {MAX_ROUTING}")]
    Routing,
    #[error("not an answer of the helper's")]
    Answer,
}

impl Interface {
    pub fn parse(text: &str) -> Result<Self, Refused> {
        let fits = (1..=15).contains(&text.len())
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(Refused::Interface)
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl ZoneName {
    pub fn parse(text: &str) -> Result<Self, Refused> {
        let fits = text.len() <= 253 && text.split('.').all(|label| Name::parse(label).is_ok());
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(Refused::Routing)
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Request {
    /// One line without its end.
    pub fn parse(line: &[u8]) -> Result<Self, Refused> {
        let plain = line.len() < MAX_LINE && line.iter().all(|b| (0x20..0x7f).contains(b));
        let text = std::str::from_utf8(line).map_err(|_| Refused::Line)?;
        if !plain {
            return Err(Refused::Line);
        }
        let words: Vec<&str> = text.split(' ').collect();
        match words.as_slice() {
            ["restore"] => Ok(Self::Restore),
            ["status"] => Ok(Self::Status),
            ["set", interface, domain, servers, routing] => Ok(Self::Set(Setting {
                interface: Interface::parse(interface)?,
                domain: Domain::parse(domain).map_err(|_| Refused::Domain)?,
                servers: list(servers, MAX_SERVERS, Refused::Server, server)?,
                routing: list(routing, MAX_ROUTING, Refused::Routing, ZoneName::parse)?,
            })),
            ["set", ..] => Err(Refused::Words),
            _ => Err(Refused::Verb),
        }
    }
}

fn list<T>(
    text: &str,
    most: usize,
    refused: Refused,
    parse: impl Fn(&str) -> Result<T, Refused>,
) -> Result<Vec<T>, Refused> {
    if text.split(',').count() > most {
        return Err(refused);
    }
    text.split(',').map(parse).collect()
}

fn server(text: &str) -> Result<IpAddr, Refused> {
    let address: IpAddr = text.parse().map_err(|_| Refused::Server)?;
    let askable = !address.is_unspecified()
        && !address.is_multicast()
        && !matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    askable.then_some(address).ok_or(Refused::Server)
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Restore => f.write_str("restore"),
            Self::Status => f.write_str("status"),
            Self::Set(setting) => {
                let servers: Vec<String> = setting.servers.iter().map(IpAddr::to_string).collect();
                let routing: Vec<&str> = setting.routing.iter().map(ZoneName::as_str).collect();
                write!(
                    f,
                    "set {} {} {} {}",
                    setting.interface.as_str(),
                    setting.domain,
                    servers.join(","),
                    routing.join(",")
                )
            }
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None => "none",
            Self::Resolved => "systemd-resolved",
            Self::Resolvconf => "resolvconf",
            Self::Replaced => "replaced",
            Self::InPlace => "in-place",
        })
    }
}

impl FromStr for Mode {
    type Err = Refused;

    fn from_str(text: &str) -> Result<Self, Refused> {
        let all = [
            Self::None,
            Self::Resolved,
            Self::Resolvconf,
            Self::Replaced,
            Self::InPlace,
        ];
        let found = all.into_iter().find(|mode| mode.to_string() == text);
        found.ok_or(Refused::Answer)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ok {} {}", self.mode, self.upstreams.join(","))
    }
}

impl Report {
    /// What the helper says, without the line's end: the outer error is the helper's own words.
    pub fn parse(line: &str) -> Result<Result<Self, String>, Refused> {
        if let Some(words) = line.strip_prefix("error ") {
            let plain = words.chars().filter(|c| !c.is_control()).collect();
            return Ok(Err(plain));
        }
        let words: Vec<&str> = line.split(' ').collect();
        let ["ok", mode, upstreams] = words.as_slice() else {
            return Err(Refused::Answer);
        };
        let upstreams = upstreams.split(',').filter(|text| !text.is_empty());
        Ok(Ok(Self {
            mode: mode.parse()?,
            upstreams: upstreams.map(str::to_owned).collect(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HONEST: &str =
        "set mesh0 mesh.internal 100.64.0.1,fd01::1 mesh.internal,100.in-addr.arpa";

    #[test]
    fn requests_read_as_written() {
        for line in [HONEST, "restore", "status"] {
            assert_eq!(Request::parse(line.as_bytes()).unwrap().to_string(), line);
        }
    }

    #[test]
    fn everything_else_is_refused_in_words() {
        let check =
            |line: &str, why| assert_eq!(Request::parse(line.as_bytes()), Err(why), "{line}");
        check("", Refused::Verb);
        check("reboot", Refused::Verb);
        check("restore now", Refused::Verb);
        check("set", Refused::Words);
        check("set a b c d e", Refused::Words);
        check("set mesh0 mesh.internal  mesh.internal", Refused::Server);
        check(
            "set --help m.internal 10.0.0.1 m.internal",
            Refused::Interface,
        );
        check(
            "set ../eth0 m.internal 10.0.0.1 m.internal",
            Refused::Interface,
        );
        check("set mesh0 arpa 10.0.0.1 m.internal", Refused::Domain);
        check("set mesh0 m.internal\nsearch 10.0.0.1 m", Refused::Line);
        check("set mesh0 m.internal 0.0.0.0 m", Refused::Server);
        check("set mesh0 m.internal ff02::fb m", Refused::Server);
        check(
            "set mesh0 m.internal 1.1.1.1,1.1.1.2,1.1.1.3,1.1.1.4 m",
            Refused::Server,
        );
        check("set mesh0 m.internal 10.0.0.1 m,-h", Refused::Routing);
        check("set mesh0 m.internal 10.0.0.1 .", Refused::Routing);
        check(&format!("status{}", " ".repeat(MAX_LINE)), Refused::Line);
        assert_eq!(Request::parse(&[0xff, 0xfe]), Err(Refused::Line));
    }

    #[test]
    fn reports_read_as_written() {
        for line in [
            "ok replaced 10.0.0.1,fe80::1%eth0",
            "ok none ",
            "ok systemd-resolved 9.9.9.9",
        ] {
            let report = Report::parse(line).unwrap().unwrap();
            assert_eq!(report.to_string(), line);
        }
        assert_eq!(
            Report::parse("error no\x1b[31m").unwrap(),
            Err("no[31m".to_owned())
        );
        assert_eq!(Report::parse("ok maybe "), Err(Refused::Answer));
    }

    proptest! {
        #[test]
        fn what_parses_holds_nothing_that_could_break_a_line(line: Vec<u8>) {
            if let Ok(request) = Request::parse(&line) {
                prop_assert!(request.to_string().bytes().all(|b| (0x20..0x7f).contains(&b)));
            }
        }

        #[test]
        fn a_damaged_request_is_refused_or_means_what_it_says(at in 0..HONEST.len(), byte: u8) {
            let mut line = HONEST.as_bytes().to_vec();
            line[at] = byte;
            if let Ok(request) = Request::parse(&line) {
                prop_assert_eq!(Request::parse(request.to_string().as_bytes()), Ok(request));
            }
        }
    }
}
