//! Steps as netlink attributes, cut into messages that fit.

use std::collections::BTreeSet;

use ipnet::IpNet;
use mesh_core::key::NodePublic;
use mesh_core::wireguard::DeviceOp;
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute,
    WireguardPeer, WireguardPeerAttribute as Attr, WireguardPeerFlags as Flags,
};

/// Bytes of peers in one message, well under the 64 KiB of an attribute.
const ROOM: usize = 32 << 10;
/// At most what a peer takes without its allowed IPs, and what each of them takes.
const PEER: usize = 160;
const ALLOWED_IP: usize = 44;
/// Allowed IPs of one peer in one message.
const MAX_ALLOWED_IPS: usize = (ROOM - PEER) / ALLOWED_IP;

/// The attributes of each message that takes `ops`, in order.
pub(super) fn messages(ops: &[DeviceOp]) -> Vec<Vec<WireguardAttribute>> {
    let mut messages = Messages::default();
    for op in ops {
        match op {
            DeviceOp::SetKey(key) => {
                messages.device(WireguardAttribute::PrivateKey(*key.expose()));
            }
            DeviceOp::SetListenPort(port) => messages.device(WireguardAttribute::ListenPort(*port)),
            DeviceOp::SetFwmark(mark) => messages.device(WireguardAttribute::Fwmark(*mark)),
            DeviceOp::RemovePeer(key) => messages.peer(*key, Flags::RemoveMe, vec![]),
            DeviceOp::AddPeer(key, config) => {
                let mut attributes: Vec<Attr> =
                    config.endpoint.map(Attr::Endpoint).into_iter().collect();
                attributes.extend(config.keepalive.map(Attr::PersistentKeepalive));
                messages.peer(*key, Flags::ReplaceAllowedIps, attributes);
                messages.allowed_ips(*key, Flags::UpdateOnly, &config.allowed_ips);
            }
            DeviceOp::SetEndpoint(key, endpoint) => {
                messages.peer(*key, Flags::UpdateOnly, vec![Attr::Endpoint(*endpoint)]);
            }
            DeviceOp::SetKeepalive(key, seconds) => {
                let keepalive = Attr::PersistentKeepalive(seconds.unwrap_or(0));
                messages.peer(*key, Flags::UpdateOnly, vec![keepalive]);
            }
            DeviceOp::AddAllowedIps(key, nets) => {
                messages.allowed_ips(*key, Flags::UpdateOnly, nets);
            }
            DeviceOp::ReplaceAllowedIps(key, nets) => {
                let replace = Flags::UpdateOnly | Flags::ReplaceAllowedIps;
                messages.peer(*key, replace, vec![]);
                messages.allowed_ips(*key, Flags::UpdateOnly, nets);
            }
        }
    }
    messages.finish()
}

#[derive(Default)]
struct Messages {
    done: Vec<Vec<WireguardAttribute>>,
    peers: Vec<WireguardPeer>,
    used: usize,
}

impl Messages {
    /// The kernel takes what is about the device before the peers of the same message, so what
    /// came before must have gone.
    fn device(&mut self, attribute: WireguardAttribute) {
        self.flush();
        self.done.push(vec![attribute]);
    }

    fn peer(&mut self, key: NodePublic, flags: Flags, attributes: Vec<Attr>) {
        let allowed: usize = attributes.iter().map(allowed_ips_in).sum();
        let size = PEER + allowed * ALLOWED_IP;
        if self.used + size > ROOM {
            self.flush();
        }
        self.used += size;
        let mut peer = vec![Attr::PublicKey(key.0), Attr::Flags(flags)];
        peer.extend(attributes);
        self.peers.push(WireguardPeer(peer));
    }

    fn allowed_ips(&mut self, key: NodePublic, flags: Flags, nets: &BTreeSet<IpNet>) {
        let nets: Vec<_> = nets.iter().map(allowed_ip).collect();
        for chunk in nets.chunks(MAX_ALLOWED_IPS) {
            self.peer(key, flags, vec![Attr::AllowedIps(chunk.to_vec())]);
        }
    }

    fn flush(&mut self) {
        let peers = std::mem::take(&mut self.peers);
        self.used = 0;
        if !peers.is_empty() {
            self.done.push(vec![WireguardAttribute::Peers(peers)]);
        }
    }

    fn finish(mut self) -> Vec<Vec<WireguardAttribute>> {
        self.flush();
        self.done
    }
}

fn allowed_ips_in(attribute: &Attr) -> usize {
    match attribute {
        Attr::AllowedIps(ips) => ips.len(),
        _ => 0,
    }
}

fn allowed_ip(net: &IpNet) -> WireguardAllowedIp {
    let family = match net {
        IpNet::V4(_) => WireguardAddressFamily::Ipv4,
        IpNet::V6(_) => WireguardAddressFamily::Ipv6,
    };
    WireguardAllowedIp(vec![
        WireguardAllowedIpAttr::Family(family),
        WireguardAllowedIpAttr::IpAddr(net.network()),
        WireguardAllowedIpAttr::Cidr(net.prefix_len()),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::key::NodeKey;
    use mesh_core::wireguard::PeerConfig;
    use netlink_packet_core::Emitable as _;

    fn nets(count: u32) -> BTreeSet<IpNet> {
        let net = |n: u32| {
            IpNet::from(std::net::IpAddr::from(std::net::Ipv6Addr::from(
                u128::from(n),
            )))
        };
        (0..count).map(net).collect()
    }

    fn add(n: u16, allowed: u32) -> DeviceOp {
        let mut key = [0; 32];
        key[..2].copy_from_slice(&n.to_be_bytes());
        let config = PeerConfig {
            endpoint: Some("[2001:db8::1]:51820".parse().unwrap()),
            allowed_ips: nets(allowed),
            keepalive: Some(25),
        };
        DeviceOp::AddPeer(NodePublic(key), config)
    }

    fn peers(message: &[WireguardAttribute]) -> &[WireguardPeer] {
        match message {
            [WireguardAttribute::Peers(peers)] => peers,
            other => panic!("peers, not {other:?}"),
        }
    }

    #[test]
    fn a_thousand_peers_go_in_messages_that_fit() {
        let ops: Vec<DeviceOp> = (0..1000).map(|n| add(n, 2)).collect();
        let messages = messages(&ops);
        assert!(messages.len() > 1);
        for message in &messages {
            assert!(message.as_slice().buffer_len() <= ROOM);
        }
        let total: usize = messages.iter().map(|message| peers(message).len()).sum();
        assert_eq!(total, 2000, "each peer, then its allowed IPs");
    }

    #[test]
    fn one_peer_with_many_prefixes_is_cut() {
        let messages = messages(&[add(1, 5000)]);
        let mut seen = 0;
        for message in &messages {
            assert!(message.as_slice().buffer_len() <= ROOM);
            let attributes = peers(message).iter().flat_map(|peer| &peer.0);
            seen += attributes.map(allowed_ips_in).sum::<usize>();
        }
        assert_eq!(seen, 5000);
    }

    #[test]
    fn steps_keep_their_order_around_the_key() {
        let ops = [
            add(1, 1),
            DeviceOp::SetKey(NodeKey::from_seed([1; 32])),
            DeviceOp::RemovePeer(NodePublic([0; 32])),
        ];
        let messages = messages(&ops);
        assert_eq!(messages.len(), 3);
        assert!(matches!(
            messages[1][..],
            [WireguardAttribute::PrivateKey(_)]
        ));
    }
}
