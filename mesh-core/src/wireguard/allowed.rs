//! Cryptokey routing: which peer an address belongs to, by longest prefix.
//!
//! A mesh has few distinct prefix lengths (every node's /32 and /128, a handful for subnet
//! routes), so one hash table per length, longest first, answers in one to four probes without a
//! tree, and a table of ten thousand nodes is as fast as one of ten.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;

/// Prefixes and their holders. A prefix has one holder.
#[derive(Clone, Debug)]
pub struct AllowedIps<T> {
    v4: Family<T>,
    v6: Family<T>,
}

/// Keyed by 128 - length, so that iteration goes from the longest to the shortest.
type Family<T> = BTreeMap<u8, HashMap<u128, T>>;

impl<T> Default for AllowedIps<T> {
    fn default() -> Self {
        Self {
            v4: BTreeMap::new(),
            v6: BTreeMap::new(),
        }
    }
}

impl<T> AllowedIps<T> {
    /// Gives `net` to `holder`, and returns who held it.
    pub fn insert(&mut self, net: IpNet, holder: T) -> Option<T> {
        let (family, key) = match net {
            IpNet::V4(_) => (&mut self.v4, bits(net.network())),
            IpNet::V6(_) => (&mut self.v6, bits(net.network())),
        };
        let table = family.entry(128 - wide_len(net)).or_default();
        table.insert(key, holder)
    }

    /// The holder of the longest prefix that contains `address`.
    pub fn longest_match(&self, address: IpAddr) -> Option<&T> {
        let family = match address {
            IpAddr::V4(_) => &self.v4,
            IpAddr::V6(_) => &self.v6,
        };
        let wide = bits(address);
        family
            .iter()
            .find_map(|(host_bits, table)| table.get(&truncate(wide, *host_bits)))
    }
}

impl<T> FromIterator<(IpNet, T)> for AllowedIps<T> {
    fn from_iter<I: IntoIterator<Item = (IpNet, T)>>(prefixes: I) -> Self {
        let mut table = Self::default();
        for (net, holder) in prefixes {
            table.insert(net, holder);
        }
        table
    }
}

/// An address as a number; IPv4 fills the low 32 bits.
fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => v6.into(),
    }
}

/// The prefix length as if the address had 128 bits.
fn wide_len(net: IpNet) -> u8 {
    net.prefix_len() + (128 - net.max_prefix_len())
}

fn truncate(wide: u128, host_bits: u8) -> u128 {
    // A shift by the full width is not defined: that is ::/0.
    u128::MAX
        .checked_shl(host_bits.into())
        .map_or(0, |mask| wide & mask)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn table(entries: &[(&str, u8)]) -> AllowedIps<u8> {
        entries
            .iter()
            .map(|(net, holder)| (net.parse().unwrap(), *holder))
            .collect()
    }

    #[test]
    fn the_longest_prefix_wins() {
        let table = table(&[
            ("100.64.0.7/32", 1),
            ("100.64.0.0/10", 2),
            ("0.0.0.0/0", 3),
            ("fd00::/8", 4),
            ("fd00::7/128", 5),
        ]);
        let check = |address: &str, holder: Option<u8>| {
            assert_eq!(
                table.longest_match(address.parse().unwrap()).copied(),
                holder,
                "{address}"
            );
        };
        check("100.64.0.7", Some(1));
        check("100.64.0.8", Some(2));
        check("9.9.9.9", Some(3));
        check("fd00::7", Some(5));
        check("fd00::8", Some(4));
        check("2001:db8::1", None);
    }

    #[test]
    fn an_ipv4_prefix_does_not_match_an_ipv6_address() {
        let table = table(&[("0.0.0.0/0", 1)]);
        assert_eq!(table.longest_match("::1".parse().unwrap()), None);
        assert_eq!(
            table.longest_match("::ffff:1.2.3.4".parse().unwrap()),
            None,
            "a mapped address is an IPv6 address"
        );
    }

    #[test]
    fn a_prefix_moves_to_its_last_holder() {
        let mut table = table(&[("10.0.0.0/8", 1)]);
        assert_eq!(table.insert("10.1.2.3/8".parse().unwrap(), 2), Some(1));
        assert_eq!(
            table.longest_match("10.9.9.9".parse().unwrap()).copied(),
            Some(2)
        );
    }

    fn net() -> impl Strategy<Value = IpNet> {
        // Few distinct bits, so that prefixes nest and collide.
        prop_oneof![
            (any::<[bool; 3]>(), 0..=32_u8).prop_map(|(b, len)| {
                let address = u32::from(b[0]) << 31 | u32::from(b[1]) << 30 | u32::from(b[2]);
                IpNet::new(IpAddr::V4(address.into()), len).unwrap().trunc()
            }),
            (any::<[bool; 3]>(), 0..=128_u8).prop_map(|(b, len)| {
                let address = u128::from(b[0]) << 127 | u128::from(b[1]) << 64 | u128::from(b[2]);
                IpNet::new(IpAddr::V6(address.into()), len).unwrap().trunc()
            }),
        ]
    }

    proptest! {
        #[test]
        fn the_table_agrees_with_a_linear_search(
            nets in prop::collection::vec(net(), 0..12),
            probes in prop::collection::vec(net(), 1..8),
        ) {
            let table: AllowedIps<usize> = nets.iter().copied().zip(0..).collect();
            for probe in probes.iter().map(IpNet::addr) {
                // `max_by_key` takes the last of equals, as a later insert replaces an earlier.
                let expected = nets
                    .iter()
                    .zip(0_usize..)
                    .filter(|(net, _)| net.contains(&probe))
                    .max_by_key(|(net, _)| net.prefix_len())
                    .map(|(_, holder)| holder);
                prop_assert_eq!(table.longest_match(probe).copied(), expected);
            }
        }
    }
}
