//! Join strings: where a coordinator is, and which key proves that it is the one.
//!
//! `mesh://coordinator.example.org:41700?pin=sha256:<64 hex digits>`. Two pins may stand while the
//! coordinator's key is being changed. The string is public: it lets nobody in.

use std::fmt;
use std::str::FromStr;

/// Port of the coordinator's node listener when the string names none.
pub const DEFAULT_PORT: u16 = 41_700;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Join {
    /// DNS name, IPv4 address or bare IPv6 address.
    pub host: String,
    pub port: u16,
    /// SHA-256 of the coordinator's SubjectPublicKeyInfo; one or two.
    pub pins: Vec<[u8; 32]>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidJoin {
    #[error("a join string starts with mesh://; `mesh-coordinator status` prints it")]
    Scheme,
    #[error("a join string names the coordinator's host: mesh://HOST:PORT?pin=sha256:…")]
    Host,
    #[error("the port of a join string is a number from 1 to 65535")]
    Port,
    #[error("a join string pins the coordinator's key: ?pin=sha256: and 64 hexadecimal digits")]
    Pin,
    #[error("a join string holds nothing but pins behind the question mark")]
    Parameter,
}

impl FromStr for Join {
    type Err = InvalidJoin;

    fn from_str(text: &str) -> Result<Self, InvalidJoin> {
        let rest = text
            .trim()
            .strip_prefix("mesh://")
            .ok_or(InvalidJoin::Scheme)?;
        let (authority, query) = rest.split_once('?').ok_or(InvalidJoin::Pin)?;
        let (host, port) = split_authority(authority.trim_end_matches('/'))?;
        let mut pins = Vec::new();
        for parameter in query.split('&') {
            let pin = parameter
                .strip_prefix("pin=")
                .ok_or(InvalidJoin::Parameter)?;
            let digits = pin.strip_prefix("sha256:").ok_or(InvalidJoin::Pin)?;
            let mut bytes = [0; 32];
            hex::decode_to_slice(digits, &mut bytes).map_err(|_| InvalidJoin::Pin)?;
            pins.push(bytes);
        }
        if pins.len() > 2 {
            return Err(InvalidJoin::Parameter);
        }
        Ok(Self { host, port, pins })
    }
}

fn split_authority(authority: &str) -> Result<(String, u16), InvalidJoin> {
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or(InvalidJoin::Host)?;
        host.parse::<std::net::Ipv6Addr>()
            .map_err(|_| InvalidJoin::Host)?;
        (
            host,
            if rest.is_empty() {
                None
            } else {
                Some(rest.strip_prefix(':').ok_or(InvalidJoin::Port)?)
            },
        )
    } else {
        match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        }
    };
    let named = !host.is_empty()
        && host.len() <= 253
        && host
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._:".contains(&b));
    if !named {
        return Err(InvalidJoin::Host);
    }
    let port = match port {
        None => DEFAULT_PORT,
        Some(port) => port
            .parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or(InvalidJoin::Port)?,
    };
    Ok((host.to_owned(), port))
}

impl fmt::Display for Join {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port, pins } = self;
        match host.contains(':') {
            true => write!(f, "mesh://[{host}]:{port}")?,
            false => write!(f, "mesh://{host}:{port}")?,
        }
        for (n, pin) in pins.iter().enumerate() {
            let mark = if n == 0 { '?' } else { '&' };
            write!(f, "{mark}pin=sha256:{}", hex::encode(pin))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pin() -> String {
        "ab".repeat(32)
    }

    #[test]
    fn what_is_printed_can_be_read() {
        for host in ["coordinator.example.org", "192.0.2.1", "2001:db8::1"] {
            let join = Join {
                host: host.to_owned(),
                port: 41_700,
                pins: vec![[7; 32], [8; 32]],
            };
            assert_eq!(join.to_string().parse(), Ok(join));
        }
    }

    #[test]
    fn the_port_may_be_left_out() {
        let join: Join = format!("mesh://h?pin=sha256:{}", pin()).parse().unwrap();
        assert_eq!((join.host.as_str(), join.port), ("h", DEFAULT_PORT));
    }

    #[test]
    fn each_mistake_has_its_word() {
        let check = |text: String, error| assert_eq!(text.parse::<Join>(), Err(error), "{text}");
        let pin = pin();
        check(format!("https://h?pin=sha256:{pin}"), InvalidJoin::Scheme);
        check(format!("mesh://?pin=sha256:{pin}"), InvalidJoin::Host);
        check(format!("mesh://a b?pin=sha256:{pin}"), InvalidJoin::Host);
        check(
            format!("mesh://[::g]:1?pin=sha256:{pin}"),
            InvalidJoin::Host,
        );
        check(format!("mesh://h:0?pin=sha256:{pin}"), InvalidJoin::Port);
        check(
            format!("mesh://h:70000?pin=sha256:{pin}"),
            InvalidJoin::Port,
        );
        check("mesh://h:1".to_owned(), InvalidJoin::Pin);
        check("mesh://h:1?pin=sha256:12".to_owned(), InvalidJoin::Pin);
        check(format!("mesh://h:1?pin=md5:{pin}"), InvalidJoin::Pin);
        check(format!("mesh://h:1?key={pin}"), InvalidJoin::Parameter);
    }
}
