//! Sets of IP addresses: union, difference, and the prefixes that say the same.
//!
//! Kept as sorted, disjoint, never adjoining ranges, so that two equal sets are equal values.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub(super) struct IpSet {
    v4: Ranges,
    v6: Ranges,
}

impl IpSet {
    pub(super) fn remove(&mut self, net: IpNet) {
        self.alter(vec![net], false);
    }

    /// Takes all of `nets` in, or all of them out.
    pub(super) fn alter(&mut self, nets: Vec<IpNet>, add: bool) {
        let (v4, v6): (Vec<IpNet>, Vec<IpNet>) = nets
            .into_iter()
            .partition(|net| matches!(net, IpNet::V4(_)));
        for (ranges, nets) in [(&mut self.v4, v4), (&mut self.v6, v6)] {
            let other = Ranges::of(nets.into_iter().map(bounds).collect());
            *ranges = match add {
                true => Ranges::of([&ranges.0[..], &other.0].concat()),
                false => ranges.without(&other),
            };
        }
    }

    /// The whole of `net`.
    pub(super) fn contains_net(&self, net: IpNet) -> bool {
        let (first, last) = bounds(net);
        self.family(net).contains(first, last)
    }

    /// Some of `net`.
    pub(super) fn overlaps(&self, net: IpNet) -> bool {
        let (first, last) = bounds(net);
        self.family(net).overlaps(first, last)
    }

    /// The fewest prefixes that make up the set, ascending, IPv4 first.
    pub(super) fn prefixes(&self) -> Vec<IpNet> {
        let v4 = self.v4.prefixes(32).into_iter().map(|(first, len)| {
            let address = Ipv4Addr::from(u32::try_from(first).unwrap_or(u32::MAX));
            IpNet::V4(Ipv4Net::new_assert(address, len))
        });
        let v6 = self
            .v6
            .prefixes(128)
            .into_iter()
            .map(|(first, len)| IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::from(first), len)));
        v4.chain(v6).collect()
    }

    fn family(&self, net: IpNet) -> &Ranges {
        match net {
            IpNet::V4(_) => &self.v4,
            IpNet::V6(_) => &self.v6,
        }
    }
}

impl FromIterator<IpNet> for IpSet {
    fn from_iter<I: IntoIterator<Item = IpNet>>(nets: I) -> Self {
        let mut set = Self::default();
        set.alter(nets.into_iter().collect(), true);
        set
    }
}

/// First and last address of a prefix, as numbers.
pub(super) fn bounds(net: IpNet) -> (u128, u128) {
    let number = |address: IpAddr| match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    };
    (number(net.network()), number(net.broadcast()))
}

/// Sorted, disjoint, with a gap between neighbours; both ends included.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
struct Ranges(Vec<(u128, u128)>);

impl Ranges {
    fn of(mut ranges: Vec<(u128, u128)>) -> Self {
        ranges.sort_unstable();
        let mut merged: Vec<(u128, u128)> = Vec::new();
        for (first, last) in ranges {
            match merged.last_mut() {
                Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                _ => merged.push((first, last)),
            }
        }
        Self(merged)
    }

    fn without(&self, other: &Self) -> Self {
        let mut kept = Vec::new();
        let mut holes = other.0.iter().peekable();
        for &(start, end) in &self.0 {
            let mut at = Some(start);
            while let Some(&&(first, last)) = holes.peek() {
                if first > end {
                    break;
                }
                if let Some(from) = at.filter(|from| *from < first) {
                    kept.push((from, first - 1));
                }
                at = at.and_then(|from| last.checked_add(1).map(|next| from.max(next)));
                if last > end {
                    break;
                }
                holes.next();
            }
            kept.extend(at.filter(|from| *from <= end).map(|from| (from, end)));
        }
        Self(kept)
    }

    fn contains(&self, first: u128, last: u128) -> bool {
        let at = self.0.partition_point(|&(_, end)| end < first);
        self.0
            .get(at)
            .is_some_and(|&(start, end)| start <= first && last <= end)
    }

    fn overlaps(&self, first: u128, last: u128) -> bool {
        let at = self.0.partition_point(|&(_, end)| end < first);
        self.0.get(at).is_some_and(|&(start, _)| start <= last)
    }

    fn prefixes(&self, bits: u8) -> Vec<(u128, u8)> {
        let mut prefixes = Vec::new();
        for &(start, end) in &self.0 {
            let mut at = start;
            loop {
                // The largest block that starts here and does not pass the end.
                let aligned = at.trailing_zeros().min(u32::from(bits));
                let size = (0..=aligned)
                    .rev()
                    .find(|&size| block_end(at, size) <= end)
                    .unwrap_or(0);
                prefixes.push((at, bits - u8::try_from(size).unwrap_or(bits)));
                match block_end(at, size).checked_add(1) {
                    Some(next) if next <= end => at = next,
                    _ => break,
                }
            }
        }
        prefixes
    }
}

/// Last number of the block of 2^`size` that starts at `at`.
fn block_end(at: u128, size: u32) -> u128 {
    at | 1_u128
        .checked_shl(size)
        .map_or(u128::MAX, |block| block - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(nets: &[&str]) -> IpSet {
        nets.iter()
            .map(|net| net.parse::<IpNet>().unwrap())
            .collect()
    }

    fn shown(set: &IpSet) -> Vec<String> {
        set.prefixes().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn neighbours_become_one_and_holes_are_cut() {
        assert_eq!(shown(&set(&["10.0.0.0/9", "10.128.0.0/9"])), ["10.0.0.0/8"]);
        let mut pool = set(&["100.64.0.0/10", "fd00::/8"]);
        pool.remove("100.115.92.0/23".parse().unwrap());
        assert!(!pool.contains_net("100.115.93.9".parse::<IpAddr>().unwrap().into()));
        assert!(pool.contains_net("100.115.94.0".parse::<IpAddr>().unwrap().into()));
        pool.alter(vec!["100.115.92.0/23".parse().unwrap()], true);
        assert_eq!(shown(&pool), ["100.64.0.0/10", "fd00::/8"]);
        assert_eq!(shown(&set(&["0.0.0.0/0", "::/0"])), ["0.0.0.0/0", "::/0"]);
    }

    fn prefix() -> impl Strategy<Value = IpNet> {
        (any::<[u8; 4]>(), 24_u8..=32).prop_map(|([.., c, d], len)| {
            IpNet::new([10, 0, c % 2, d].into(), len).unwrap().trunc()
        })
    }

    proptest! {
        #[test]
        fn a_set_holds_what_was_put_in_and_not_taken_out(
            steps in prop::collection::vec((any::<bool>(), prefix()), 0..12),
            probe in any::<u16>(),
        ) {
            let mut set = IpSet::default();
            let address: IpAddr = [10, 0, (probe >> 8) as u8 % 2, probe as u8].into();
            let mut held = false;
            for (insert, net) in steps {
                set.alter(vec![net], insert);
                if net.contains(&address) { held = insert; }
            }
            prop_assert_eq!(set.contains_net(address.into()), held);
            let prefixes = set.prefixes();
            prop_assert_eq!(prefixes.iter().filter(|net| net.contains(&address)).count(), usize::from(held));
            prop_assert_eq!(prefixes.into_iter().collect::<IpSet>(), set);
        }
    }
}
