//! Address allocation: which mesh addresses a new node gets.
//!
//! Deterministic, so that a test can name the result: the lowest IPv4 host of the first prefix with
//! one that nobody holds, and an IPv6 address that carries the same 32 bits behind the mesh's /48. Network and
//! broadcast address and the reserved range are never given out.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::Ipv4Net;

use crate::node::Addresses;
use crate::world::Pools;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the address pool is exhausted: every address of it belongs to a node")]
pub struct PoolExhausted;

/// The addresses of the next node, `taken` being those of all the others: from the first of `nets`,
/// all within the mesh's pool, that has one left.
pub fn allocate(
    pools: &Pools,
    nets: &[Ipv4Net],
    taken: &BTreeSet<Ipv4Addr>,
) -> Result<Addresses, PoolExhausted> {
    let v4 = nets.iter().find_map(|net| lowest(pools, *net, taken));
    let v4 = v4.ok_or(PoolExhausted)?;
    Ok(Addresses {
        v4,
        v6: v6_of(pools, v4),
    })
}

/// The lowest host within `net` that nobody holds.
fn lowest(pools: &Pools, net: Ipv4Net, taken: &BTreeSet<Ipv4Addr>) -> Option<Ipv4Addr> {
    let (network, broadcast) = (pools.v4.network(), pools.v4.broadcast());
    let first = u32::from(net.network()).max(u32::from(network).saturating_add(1));
    let last = u32::from(net.broadcast()).min(u32::from(broadcast).saturating_sub(1));
    let reserved = Pools::reserved_v4();
    let after_reserved = u32::from(reserved.broadcast()) + 1;

    // `taken` is ordered: walk it beside the pool and stop at the first hole.
    let mut used = taken
        .range(Ipv4Addr::from(first)..)
        .copied()
        .map(u32::from)
        .peekable();
    let mut candidate = first;
    while candidate <= last {
        if reserved.contains(&Ipv4Addr::from(candidate)) {
            candidate = after_reserved;
        } else if used.next_if(|used| *used < candidate).is_some() {
            continue;
        } else if used.peek() == Some(&candidate) {
            candidate = candidate.checked_add(1)?;
        } else {
            break;
        }
    }
    (candidate <= last).then(|| Ipv4Addr::from(candidate))
}

/// The IPv6 address that belongs to `v4`: its bits behind the mesh's prefix.
fn v6_of(pools: &Pools, v4: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(pools.v6.network()) | u128::from(u32::from(v4)))
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

    fn take(pools: &Pools, count: usize) -> Vec<Ipv4Addr> {
        let mut taken = BTreeSet::new();
        let mut order = Vec::new();
        for _ in 0..count {
            let Ok(addresses) = allocate(pools, &[pools.v4], &taken) else {
                break;
            };
            assert!(taken.insert(addresses.v4));
            order.push(addresses.v4);
        }
        order
    }

    #[test]
    fn addresses_come_in_order_and_holes_are_filled() {
        let pools = pools("100.64.0.0/10");
        assert_eq!(
            take(&pools, 2),
            ["100.64.0.1", "100.64.0.2"].map(|a| a.parse::<Ipv4Addr>().unwrap())
        );
        let taken = ["100.64.0.1", "100.64.0.3"]
            .map(|a| a.parse().unwrap())
            .into();
        let next = allocate(&pools, &[pools.v4], &taken).unwrap();
        assert_eq!(next.v4.to_string(), "100.64.0.2");
        assert_eq!(next.v6.to_string(), "fd01:203:405::6440:2");
    }

    #[test]
    fn a_small_pool_ends_in_words() {
        assert_eq!(take(&pools("10.9.0.0/29"), 20).len(), 6);
        let pools = pools("10.9.0.0/29");
        let full = take(&pools, 20).into_iter().collect();
        assert_eq!(allocate(&pools, &[pools.v4], &full), Err(PoolExhausted));
    }

    #[test]
    fn parts_of_the_pool_are_used_up_in_their_order_and_to_the_edge() {
        let pools = pools("10.9.0.0/24");
        let nets =
            ["10.9.0.128/31", "10.9.0.0/31", "10.9.0.255/32"].map(|net| net.parse().unwrap());
        let mut taken = BTreeSet::new();
        let mut next = || {
            let addresses = allocate(&pools, &nets, &taken).ok()?;
            taken.insert(addresses.v4);
            Some(addresses.v4.to_string())
        };
        // The mesh's own network and broadcast address are nobody's in any part.
        let given: Vec<String> = std::iter::from_fn(&mut next).collect();
        assert_eq!(given, ["10.9.0.128", "10.9.0.129", "10.9.0.1"]);
    }

    #[test]
    fn the_reserved_range_is_left_out() {
        let order = take(&pools("100.115.92.0/22"), 2000);
        assert_eq!(order.len(), 511);
        assert!(order.iter().all(|a| !Pools::reserved_v4().contains(a)));
    }
}
