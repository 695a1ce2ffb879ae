//! Names under in-addr.arpa and ip6.arpa, and which of them a pool makes ours.
//!
//! A pool may end inside a byte (100.64.0.0/10), where DNS has no cut. Ours is every name whose
//! digits all lie within the pool, so 64.100.in-addr.arpa to 127.100.in-addr.arpa are, and
//! 100.in-addr.arpa is not (RFC 1035, section 3.5; RFC 3596, section 2.5).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use hickory_proto::rr::Name as DnsName;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::world::Pools;

/// A name under one of the two trees, read from its root side as far as it spells an address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Reverse {
    net: IpNet,
    /// Labels before those that spell the prefix: `x` in `x.1.0.64.100.in-addr.arpa`.
    strays: usize,
    name: DnsName,
}

impl Reverse {
    /// `None` when the name is in neither tree.
    pub(super) fn parse(name: &DnsName) -> Option<Self> {
        let labels: Vec<&[u8]> = name.iter().collect();
        let (tree, digits) = match labels.as_slice() {
            [digits @ .., tree, arpa] if arpa.eq_ignore_ascii_case(b"arpa") => (tree, digits),
            _ => return None,
        };
        let from_root = digits.iter().rev();
        let (net, spelt) = if tree.eq_ignore_ascii_case(b"in-addr") {
            let octets: Vec<u8> = from_root.map_while(|l| octet(l)).take(4).collect();
            (v4_net(&octets), octets.len())
        } else if tree.eq_ignore_ascii_case(b"ip6") {
            let nibbles: Vec<u8> = from_root.map_while(|l| nibble(l)).take(32).collect();
            (v6_net(&nibbles), nibbles.len())
        } else {
            return None;
        };
        Some(Self {
            net,
            strays: digits.len() - spelt,
            name: name.clone(),
        })
    }

    /// The apex of the zone of ours that holds this name; `None` when none does.
    ///
    /// It is the shortest ending of the name that lies within the pool.
    pub(super) fn zone_within(&self, pools: &Pools) -> Option<DnsName> {
        let (pool, step) = match self.net {
            IpNet::V4(_) => (IpNet::from(pools.v4), 8),
            IpNet::V6(_) => (IpNet::from(pools.v6), 4),
        };
        if !pool.contains(&self.net) {
            return None;
        }
        // The tree's own two labels, then one label for each step that is begun.
        let labels = 2 + usize::from(pool.prefix_len().div_ceil(step));
        Some(self.name.trim_to(labels))
    }

    /// The one address that the name spells, when it spells a whole one and nothing else.
    pub(super) fn address(&self) -> Option<IpAddr> {
        (self.strays == 0 && self.net.prefix_len() == self.net.max_prefix_len())
            .then(|| self.net.addr())
    }

    /// The addresses whose names are this one or stand below it; nothing stands below a stray.
    pub(super) fn range(&self) -> Option<RangeInclusive<IpAddr>> {
        (self.strays == 0).then(|| self.net.network()..=self.net.broadcast())
    }
}

/// The fewest reverse zones that hold both pools, cut at whole labels and so perhaps wider.
pub(super) fn enclosing_zones(pools: &Pools) -> Vec<String> {
    let octets = pools.v4.network().octets();
    let nibbles = nibbles_of(pools.v6.network());
    let v4 = &octets[..usize::from(pools.v4.prefix_len() / 8)];
    let v6 = &nibbles[..usize::from(pools.v6.prefix_len() / 4)];
    let spell = |digits: Vec<String>, tree: &str| {
        let labels = digits.into_iter().rev().chain([tree.to_owned()]);
        labels.collect::<Vec<_>>().join(".")
    };
    vec![
        spell(v4.iter().map(u8::to_string).collect(), "in-addr.arpa"),
        spell(v6.iter().map(|n| format!("{n:x}")).collect(), "ip6.arpa"),
    ]
}

/// One decimal octet as RFC 1035 writes it: no sign, no leading zero.
fn octet(label: &[u8]) -> Option<u8> {
    let text = std::str::from_utf8(label).ok()?;
    let value: u8 = text.parse().ok()?;
    (value.to_string() == text).then_some(value)
}

fn nibble(label: &[u8]) -> Option<u8> {
    let [digit] = label else { return None };
    let value = char::from(*digit).to_digit(16)?;
    u8::try_from(value).ok()
}

fn nibbles_of(address: Ipv6Addr) -> Vec<u8> {
    let octets = address.octets();
    octets.iter().flat_map(|o| [o >> 4, o & 0x0f]).collect()
}

fn v4_net(octets: &[u8]) -> IpNet {
    let mut whole = [0; 4];
    let mut length = 0;
    for (slot, octet) in whole.iter_mut().zip(octets) {
        *slot = *octet;
        length += 8;
    }
    Ipv4Net::new_assert(Ipv4Addr::from(whole), length).into()
}

fn v6_net(nibbles: &[u8]) -> IpNet {
    let mut bits = 0_u128;
    let mut length = 0;
    for nibble in nibbles.iter().take(32) {
        length += 4;
        bits |= u128::from(*nibble) << (128 - u32::from(length));
    }
    Ipv6Net::new_assert(Ipv6Addr::from(bits), length).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pools(v4: &str) -> Pools {
        Pools {
            v4: v4.parse().unwrap(),
            v6: Pools::ula([1, 2, 3, 4, 5]),
        }
    }

    /// `None`: not ours. Otherwise the apex of the zone that it is in.
    fn zone(v4: &str, name: &str) -> Option<String> {
        let name = DnsName::from_ascii(name).unwrap();
        let zone = Reverse::parse(&name)?.zone_within(&pools(v4))?;
        Some(zone.to_ascii())
    }

    #[test]
    fn ours_is_what_lies_within_the_pool() {
        let check = |pool: &str, name: &str, apex: Option<&str>| {
            let name = format!("{name}.in-addr.arpa.");
            let apex = apex.map(|apex| format!("{apex}.in-addr.arpa."));
            assert_eq!(zone(pool, &name), apex, "{name} in {pool}");
        };
        check("100.64.0.0/10", "1.0.64.100", Some("64.100"));
        check("100.64.0.0/10", "127.100", Some("127.100"));
        check("100.64.0.0/10", "1.0.128.100", None);
        check("100.64.0.0/10", "100", None);
        check("100.64.0.0/10", "063.100", None);
        check("100.64.0.0/10", "x.1.0.64.100", Some("64.100"));
        check("100.64.0.0/10", "256.0.64.100", Some("64.100"));
        check("10.9.0.0/29", "1.0.9.10", Some("1.0.9.10"));
        check("10.9.0.0/29", "9.0.9.10", None);
        check("10.9.0.0/16", "9.10", Some("9.10"));
        check("10.0.0.0/8", "1.2.3.4.10", Some("10"));
    }

    #[test]
    fn the_six_tree_is_cut_at_the_site_prefix() {
        let ours = "5.0.4.0.3.0.2.0.1.0.d.f.ip6.arpa.";
        assert_eq!(
            zone("10.0.0.0/8", &format!("F.{ours}")).as_deref(),
            Some(ours)
        );
        assert_eq!(zone("10.0.0.0/8", "0.4.0.3.0.2.0.1.0.d.f.ip6.arpa."), None);
        assert_eq!(zone("10.0.0.0/8", "ip6.arpa."), None);
        assert_eq!(zone("10.0.0.0/8", "arpa."), None);
        assert_eq!(zone("10.0.0.0/8", "1.0.0.10.example."), None);
    }

    #[test]
    fn routing_zones_enclose_the_pools() {
        assert_eq!(
            enclosing_zones(&pools("100.64.0.0/10")),
            ["100.in-addr.arpa", "5.0.4.0.3.0.2.0.1.0.d.f.ip6.arpa"]
        );
        assert_eq!(
            enclosing_zones(&pools("10.9.8.0/24"))[0],
            "8.9.10.in-addr.arpa"
        );
    }
}
