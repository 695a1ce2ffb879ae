//! Protocols and ports, as policy writes them: `tcp`, `17`, `22,80-443`, `*`.
//!
//! A protocol that is not named means four of them: TCP, UDP, ICMP and ICMPv6. Only TCP, UDP and
//! SCTP have ports; a rule for any other must say `*`.

use std::fmt;

use crate::netmap::PortRange;

/// IP protocol numbers that rules are written about (IANA "Assigned Internet Protocol Numbers").
pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMPV6: u8 = 58;
pub(super) const SCTP: u8 = 132;

/// What a rule without a protocol is about.
pub(super) const DEFAULT_PROTOCOLS: [u8; 4] = [ICMP, TCP, UDP, ICMPV6];

/// Names, lower case; the first of a number is the one that we print.
const NAMES: [(&str, u8); 14] = [
    ("icmp", ICMP),
    ("igmp", 2),
    ("ipv4", 4),
    ("ip-in-ip", 4),
    ("tcp", TCP),
    ("egp", 8),
    ("igp", 9),
    ("udp", UDP),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("ipv6-icmp", ICMPV6),
    ("sctp", SCTP),
    ("fc", 133),
];

/// `None` is the four of [`DEFAULT_PROTOCOLS`].
pub(super) type Protocol = Option<u8>;

/// The number of a protocol that policies call by a name.
pub fn protocol_number(name: &str) -> Option<u8> {
    let name = name.to_ascii_lowercase();
    let known = NAMES.iter().find(|(known, _)| *known == name);
    known.map(|(_, number)| *number)
}

pub(super) fn parse_protocol(text: &str) -> Result<Protocol, String> {
    let text = text.trim();
    let name = text.to_ascii_lowercase();
    if name.is_empty() {
        return Ok(None);
    }
    if let Some(number) = protocol_number(&name) {
        return Ok(Some(number));
    }
    if name == "*" {
        return Err(
            "proto name \"*\" not known; leave the protocol out to mean tcp, udp and icmp"
                .to_owned(),
        );
    }
    if !name.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!(
            "proto name {text:?} not known; use a name such as tcp, udp, icmp, sctp, or a number from 1 to 255"
        ));
    }
    if name.starts_with('0') {
        return Err(format!("proto {text:?}: leading 0 not permitted"));
    }
    name.parse()
        .map(Some)
        .map_err(|_| format!("proto {text:?}: out of range (0-255)"))
}

/// The name of a protocol, or its number.
pub fn protocol_name(number: u8) -> String {
    NAMES
        .iter()
        .find(|(_, known)| *known == number)
        .map_or_else(|| number.to_string(), |(name, _)| (*name).to_owned())
}

/// Whether a rule about this protocol may name ports.
pub(super) fn has_ports(protocol: Protocol) -> bool {
    protocol.is_none_or(|number| [TCP, UDP, SCTP].contains(&number))
}

/// Disjoint, ascending, never empty.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Ports(Vec<PortRange>);

impl Ports {
    pub(super) fn all() -> Self {
        Self(vec![PortRange::ALL])
    }

    pub(super) fn is_all(&self) -> bool {
        self.0 == [PortRange::ALL]
    }

    pub(super) fn ranges(&self) -> &[PortRange] {
        &self.0
    }

    /// The one port, if it is one.
    pub(super) fn single(&self) -> Option<u16> {
        match self.0[..] {
            [range] if range.first == range.last => Some(range.first),
            _ => None,
        }
    }

    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text == "*" {
            return Ok(Self::all());
        }
        let mut ranges = Vec::new();
        for part in text.split(',') {
            ranges.push(parse_range(part.trim())?);
        }
        ranges.sort();
        let mut merged: Vec<PortRange> = Vec::new();
        for range in ranges {
            match merged.last_mut() {
                Some(last) if u32::from(range.first) <= u32::from(last.last) + 1 => {
                    last.last = last.last.max(range.last);
                }
                _ => merged.push(range),
            }
        }
        Ok(Self(merged))
    }
}

fn parse_range(part: &str) -> Result<PortRange, String> {
    if part == "*" {
        return Ok(PortRange::ALL);
    }
    let (first, last) = part.split_once('-').unwrap_or((part, part));
    let first = parse_port(first).ok_or_else(|| {
        format!("port range {part:?}: invalid first integer; write 22, 80-443, 22,80 or *")
    })?;
    let last =
        parse_port(last).ok_or_else(|| format!("port range {part:?}: invalid last integer"))?;
    if last == 0 {
        return Err(format!(
            "port range {part:?}: first port must be >0, or use '*' for wildcard"
        ));
    }
    if first > last {
        return Err(format!(
            "invalid port range: first port is greater than last port: {part:?}"
        ));
    }
    Ok(PortRange { first, last })
}

fn parse_port(text: &str) -> Option<u16> {
    let text = text.trim();
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_all() {
            return f.write_str("*");
        }
        for (index, range) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            if range.first == range.last {
                write!(f, "{}", range.first)?;
            } else {
                write!(f, "{}-{}", range.first, range.last)?;
            }
        }
        Ok(())
    }
}

/// One item of a grant's `ip` list: `*`, `22,80`, `tcp:443`, `icmp:*`.
pub(super) fn parse_grant_item(text: &str) -> Result<(Protocol, Ports), String> {
    let text = text.trim();
    let (protocol, ports) = match text.rsplit_once(':') {
        Some((protocol, ports)) => (parse_protocol(protocol)?, ports),
        None => (None, text),
    };
    let ports = Ports::parse(ports)?;
    if !has_ports(protocol) && !ports.is_all() {
        return Err(format!(
            "{text:?}: protocol does not support specific ports, only '*'"
        ));
    }
    Ok((protocol, ports))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(text: &str) -> String {
        Ports::parse(text).map_or_else(|error| error, |ports| ports.to_string())
    }

    #[test]
    fn ports_are_sorted_and_merged() {
        assert_eq!(ports("443,80,81-90,22"), "22,80-90,443");
        assert_eq!(ports("0-65535"), "*");
        assert_eq!(ports("1-65535"), "1-65535");
        assert_eq!(ports("*"), "*");
    }

    #[test]
    fn ports_out_of_range_are_refused_in_words() {
        assert!(ports("ssh").starts_with("port range \"ssh\": invalid first integer"));
        assert!(ports("0").contains("first port must be >0"));
        assert!(ports("90-80").contains("greater than last"));
        assert!(ports("65536").contains("invalid first"));
        assert!(ports("-1").contains("invalid first"));
        assert!(ports("").contains("invalid first"));
        assert!(ports("+22").contains("invalid first"));
    }

    #[test]
    fn protocols_have_names_and_numbers() {
        let check = |text: &str, expected: Result<Protocol, &str>| {
            let got = parse_protocol(text);
            match expected {
                Ok(protocol) => assert_eq!(got, Ok(protocol), "{text}"),
                Err(fragment) => assert!(got.unwrap_err().contains(fragment), "{text}"),
            }
        };
        check("", Ok(None));
        check("TCP", Ok(Some(6)));
        check("ip-in-ip", Ok(Some(4)));
        check("6", Ok(Some(6)));
        check("255", Ok(Some(255)));
        check("256", Err("out of range"));
        check("06", Err("leading 0"));
        check("*", Err("proto name \"*\" not known"));
        check("tpc", Err("not known"));
    }

    #[test]
    fn grant_items_are_ports_or_protocol_and_ports() {
        let item = |text: &str| parse_grant_item(text).map(|(p, ports)| (p, ports.to_string()));
        assert_eq!(item("*"), Ok((None, "*".to_owned())));
        assert_eq!(item("80,443"), Ok((None, "80,443".to_owned())));
        assert_eq!(item("tcp:443"), Ok((Some(6), "443".to_owned())));
        assert_eq!(item("icmp:*"), Ok((Some(1), "*".to_owned())));
        assert!(item("icmp:8").unwrap_err().contains("does not support"));
        assert!(item("*:80").unwrap_err().contains("not known"));
        assert!(item("tcp:80:90").unwrap_err().contains("not known"));
        assert!(item("icmp").unwrap_err().contains("invalid first integer"));
    }
}
