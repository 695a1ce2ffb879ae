//! Requests of the userspace socket protocol, parsed whole or refused.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use mesh_core::key::NodePublic;

/// The request makes no sense: EINVAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Invalid;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    Get,
    Set(SetRequest),
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct SetRequest {
    pub(super) private_key: Option<[u8; 32]>,
    pub(super) listen_port: Option<u16>,
    pub(super) fwmark: Option<u32>,
    pub(super) replace_peers: bool,
    pub(super) peers: Vec<PeerRequest>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct PeerRequest {
    pub(super) key: NodePublic,
    pub(super) remove: bool,
    pub(super) update_only: bool,
    /// All zeroes takes the key away.
    pub(super) preshared_key: Option<[u8; 32]>,
    pub(super) endpoint: Option<SocketAddr>,
    pub(super) keepalive: Option<u16>,
    pub(super) replace_allowed_ips: bool,
    pub(super) allowed_ips: BTreeSet<IpNet>,
}

impl Request {
    /// `lines` without their ends and without the empty one that closes the request.
    pub(super) fn parse<S: AsRef<str>>(lines: &[S]) -> Result<Self, Invalid> {
        let mut lines = lines.iter().map(AsRef::as_ref);
        match lines.next() {
            Some("get=1") if lines.next().is_none() => Ok(Self::Get),
            Some("set=1") => SetRequest::parse(lines).map(Self::Set),
            _ => Err(Invalid),
        }
    }
}

impl SetRequest {
    fn parse<'a>(lines: impl Iterator<Item = &'a str>) -> Result<Self, Invalid> {
        let mut set = Self::default();
        for line in lines {
            let (key, value) = line.split_once('=').ok_or(Invalid)?;
            match (key, set.peers.last_mut()) {
                ("public_key", _) => set.peers.push(PeerRequest::new(NodePublic(bytes(value)?))),
                (_, Some(peer)) => peer.set(key, value)?,
                ("private_key", None) => {
                    // The protocol takes a key away with zeroes; this device is none without one.
                    set.private_key = Some(bytes(value)?).filter(|key| *key != [0; 32]);
                    set.private_key.ok_or(Invalid)?;
                }
                ("listen_port", None) => set.listen_port = Some(number(value)?),
                ("fwmark", None) => set.fwmark = Some(number(value)?),
                ("replace_peers", None) => set.replace_peers = truth(value)?,
                (_, None) => return Err(Invalid),
            }
        }
        Ok(set)
    }
}

impl PeerRequest {
    fn new(key: NodePublic) -> Self {
        Self {
            key,
            remove: false,
            update_only: false,
            preshared_key: None,
            endpoint: None,
            keepalive: None,
            replace_allowed_ips: false,
            allowed_ips: BTreeSet::new(),
        }
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), Invalid> {
        match key {
            "remove" => self.remove = truth(value)?,
            "update_only" => self.update_only = truth(value)?,
            "preshared_key" => self.preshared_key = Some(bytes(value)?),
            "endpoint" => self.endpoint = Some(value.parse().map_err(|_| Invalid)?),
            "persistent_keepalive_interval" => self.keepalive = Some(number(value)?),
            "replace_allowed_ips" => self.replace_allowed_ips = truth(value)?,
            "allowed_ip" => {
                self.allowed_ips.insert(prefix(value)?);
            }
            "protocol_version" if value == "1" => {}
            _ => return Err(Invalid),
        }
        Ok(())
    }
}

fn bytes(value: &str) -> Result<[u8; 32], Invalid> {
    let mut key = [0; 32];
    hex::decode_to_slice(value, &mut key).map_err(|_| Invalid)?;
    Ok(key)
}

fn number<N: std::str::FromStr>(value: &str) -> Result<N, Invalid> {
    value.parse().map_err(|_| Invalid)
}

fn truth(value: &str) -> Result<bool, Invalid> {
    // The protocol knows no other value.
    (value == "true").then_some(true).ok_or(Invalid)
}

fn prefix(value: &str) -> Result<IpNet, Invalid> {
    let (address, length) = value.split_once('/').ok_or(Invalid)?;
    let address: IpAddr = address.parse().map_err(|_| Invalid)?;
    let net = IpNet::new(address, number(length)?).map_err(|_| Invalid)?;
    Ok(net.trunc())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KEY: &str = "0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20";

    fn parse(text: &str) -> Result<Request, Invalid> {
        Request::parse(&text.lines().collect::<Vec<_>>())
    }

    #[test]
    fn a_full_request_is_understood() {
        let text = format!(
            "set=1\nprivate_key={KEY}\nlisten_port=51820\nfwmark=7\nreplace_peers=true\n\
             public_key={KEY}\npreshared_key={KEY}\nendpoint=[fd00::1]:9\n\
             persistent_keepalive_interval=25\nreplace_allowed_ips=true\n\
             allowed_ip=10.1.2.3/8\nallowed_ip=fd00::/64\nprotocol_version=1\n\
             public_key={KEY}\nremove=true\n"
        );
        let Ok(Request::Set(set)) = parse(&text) else {
            panic!("a set request");
        };
        assert_eq!((set.listen_port, set.fwmark), (Some(51820), Some(7)));
        assert!(set.replace_peers && set.private_key.is_some());
        let [first, second] = &set.peers[..] else {
            panic!("two peers");
        };
        assert_eq!(first.endpoint, Some("[fd00::1]:9".parse().unwrap()));
        assert_eq!(first.keepalive, Some(25));
        assert!(first.allowed_ips.contains(&"10.0.0.0/8".parse().unwrap()));
        assert!(second.remove);
    }

    #[test]
    fn nonsense_is_refused() {
        let zero = "0".repeat(64);
        for text in [
            "",
            "get=2",
            "get=1\nx=1",
            "set=2",
            "set=1\nnoise",
            "set=1\nprivate_key=zz",
            &format!("set=1\nprivate_key={zero}"),
            "set=1\nlisten_port=65536",
            "set=1\nlisten_port=-1",
            "set=1\nremove=true",
            &format!("set=1\npublic_key={KEY}0"),
            &format!("set=1\npublic_key={KEY}\nallowed_ip=10.0.0.0"),
            &format!("set=1\npublic_key={KEY}\nallowed_ip=10.0.0.0/33"),
            &format!("set=1\npublic_key={KEY}\nendpoint=example.org:1"),
            &format!("set=1\npublic_key={KEY}\nremove=false"),
            &format!("set=1\npublic_key={KEY}\nprotocol_version=2"),
            &format!("set=1\npublic_key={KEY}\nlisten_port=1"),
        ] {
            assert_eq!(parse(text), Err(Invalid), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(lines in prop::collection::vec(
            "((get|set|public_key|endpoint|allowed_ip|fwmark|remove)=)?\\PC{0,70}", 0..8
        )) {
            drop(Request::parse(&lines));
        }
    }
}
