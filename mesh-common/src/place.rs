//! Which place a flow has in the two tables of flows.
//!
//! What is hard is that whoever sends chooses what is hashed: if flows could be found that share a place, a
//! few packets would push out somebody else's. So the hash has a secret, and is one whose collisions are
//! known to be as rare as chance whatever is hashed; and it must cost less than the look-up that it is for: the
//! kernel's own hash (jhash) takes some 150 instructions for a key of 40 bytes, and a fourth of that for a place.

use crate::flow::FlowKey;

/// What flows are hashed by: random, and kept from everybody.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Secret(pub [u32; 10]);

impl core::fmt::Debug for Secret {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Where a flow lies, if it is there: the key of `ct_est`; and for `ct_new` its tag, and below that its set. One
/// word, which functions pass on in one register.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Place(u64);

impl Place {
    /// NH (RFC 4418, section 5.2.2), of which two flows that are not one have the same sum with one of 2³²
    /// secrets; then a step of multiplicative hashing (Knuth, TAOCP 3, 6.4), as what is best mixed is in the middle.
    ///
    /// So what lies in a place is the flow that was looked for only if its key says so. Of two in one place, a pair
    /// in 2³², the later pushes the earlier out while both are half-open; while one is established the other stays
    /// half-open.
    #[inline(always)]
    pub fn of(key: &FlowKey, secret: &Secret) -> Self {
        let words = key.words();
        let mut hash = 0_u64;
        let mut pair = 0;
        while pair < words.len() {
            let a = words[pair].wrapping_add(secret.0[pair]);
            let b = words[pair + 1].wrapping_add(secret.0[pair + 1]);
            hash = hash.wrapping_add(u64::from(a).wrapping_mul(u64::from(b)));
            pair += 2;
        }
        hash = (hash ^ hash >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self(hash >> 16 | 1 << 47)
    }

    /// Among sets whose number is a power of two, and one more than `mask`.
    #[inline(always)]
    pub const fn set(self, mask: u32) -> u32 {
        self.0 as u32 & mask
    }

    /// Never 0.
    #[inline(always)]
    pub const fn tag(self) -> u32 {
        (self.0 >> 16) as u32
    }
}

#[cfg(test)]
pub(crate) mod tests {
    extern crate std;

    use std::{array, vec};

    use super::*;
    use crate::half_open::SETS;
    use crate::{Address, Be16, proto};

    /// Flows from one address, told apart by their ports.
    pub(crate) fn key(number: u32) -> FlowKey {
        FlowKey {
            remote: Address::from_v4_word(0x6440_0002_u32.to_be()),
            local: Address::from_v4_word(0x6440_0001_u32.to_be()),
            remote_port: Be16::new(number as u16),
            local_port: Be16::new((number >> 16) as u16),
            proto: proto::TCP,
            pad: 0,
            pad2: 0,
        }
    }

    pub(crate) fn secret(seed: u32) -> Secret {
        let mut state = seed;
        Secret(array::from_fn(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state
        }))
    }

    #[test]
    fn every_word_of_a_key_and_of_the_secret_moves_a_flow() {
        let base = Place::of(&key(0), &secret(1));
        for word in 0..10 {
            let mut other = secret(1);
            other.0[word] ^= 1;
            assert_ne!(
                Place::of(&key(0), &other),
                base,
                "word {word} of the secret"
            );
        }
        let mut keys = vec![key(0); 5];
        keys[0].remote = Address::from_v4_word(3);
        keys[1].local = Address::from_v4_word(3);
        keys[2].remote_port = Be16::new(1);
        keys[3].local_port = Be16::new(1);
        keys[4].proto = proto::UDP;
        for key in keys {
            assert_ne!(Place::of(&key, &secret(1)), base, "{key:?}");
        }
    }

    /// As balls thrown at random would lie: 65,536 of them in 8,192 sets are 8 ± 2.83 in each.
    #[test]
    fn flows_that_resemble_each_other_spread_over_the_sets() {
        for seed in 0..64 {
            let secret = secret(seed);
            // Ports counted up, and ports whose distance is a power of two.
            for stride in [1, 8, 0x1_0000, 0x11] {
                let mut sets = vec![0_u32; SETS as usize];
                for number in 0..8 * SETS {
                    let place = Place::of(&key(number.wrapping_mul(stride)), &secret);
                    assert_ne!(place.tag(), 0);
                    sets[place.set(SETS - 1) as usize] += 1;
                }
                let variance: f64 = sets.iter().map(|n| (f64::from(*n) - 8.0).powi(2)).sum();
                let variance = variance / f64::from(SETS);
                assert!(
                    variance < 20.0,
                    "{variance} with stride {stride}, seed {seed}"
                );
            }
        }
    }
}
