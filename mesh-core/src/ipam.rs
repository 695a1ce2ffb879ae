//! Address allocation: which mesh addresses a new node gets.
//!
//! Deterministic, so that a test can name the result: the lowest IPv4 host of the pool that nobody
//! holds, and an IPv6 address that carries the same 32 bits behind the mesh's /48. Network and
//! broadcast address and the reserved range are never given out.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::node::Addresses;
use crate::world::Pools;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the address pool is exhausted: every address of it belongs to a node")]
pub struct PoolExhausted;

/// The addresses of the next node, `taken` being those of all the others.
pub fn allocate(pools: &Pools, taken: &BTreeSet<Ipv4Addr>) -> Result<Addresses, PoolExhausted> {
    let first = u32::from(pools.v4.network()).saturating_add(1);
    let last = u32::from(pools.v4.broadcast()).saturating_sub(1);
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
            candidate = candidate.checked_add(1).ok_or(PoolExhausted)?;
        } else {
            break;
        }
    }
    if candidate > last {
        return Err(PoolExhausted);
    }
    let v4 = Ipv4Addr::from(candidate);
    Ok(Addresses {
        v4,
        v6: v6_of(pools, v4),
    })
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
            let Ok(addresses) = allocate(pools, &taken) else {
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
        let next = allocate(&pools, &taken).unwrap();
        assert_eq!(next.v4.to_string(), "100.64.0.2");
        assert_eq!(next.v6.to_string(), "fd01:203:405::6440:2");
    }

    #[test]
    fn a_small_pool_ends_in_words() {
        assert_eq!(take(&pools("10.9.0.0/29"), 20).len(), 6);
        let full = take(&pools("10.9.0.0/29"), 20).into_iter().collect();
        assert_eq!(allocate(&pools("10.9.0.0/29"), &full), Err(PoolExhausted));
    }

    #[test]
    fn the_reserved_range_is_left_out() {
        let order = take(&pools("100.115.92.0/22"), 2000);
        assert_eq!(order.len(), 511);
        assert!(order.iter().all(|a| !Pools::reserved_v4().contains(a)));
    }
}
