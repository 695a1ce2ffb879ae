//! The numbers that classes and rules go by.
//!
//! A number is a hash of what it stands for, so it stays the same from one compile to the next
//! without anybody remembering it, and is the same however one got there. Where two want the same,
//! which is rare among 2³² numbers, the later in the order of what they stand for takes the next.

use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest as _, Sha256};

use crate::Identity;

/// The number that a class wants, from the text of its selectors.
pub(super) fn wanted_by_class(text: &str) -> u32 {
    hash(text).max(Identity::FIRST.0)
}

/// The number that a rule wants which says `content` for the `occurrence`th time in its policy.
pub(super) fn wanted_by_rule(content: &str, occurrence: usize) -> u32 {
    hash(&format!("{occurrence}\n{content}")).max(1)
}

fn hash(text: &str) -> u32 {
    let [a, b, c, d, ..] = <[u8; 32]>::from(Sha256::digest(text.as_bytes()));
    u32::from_be_bytes([a, b, c, d])
}

/// Gives everybody the number that he wants, or else the next, none below `first`. Who comes
/// first is served first.
pub(super) fn settle(wanted: impl Iterator<Item = u32>, first: u32) -> Vec<u32> {
    let mut taken = BTreeSet::new();
    let one = |wanted: u32| {
        let mut number = wanted.max(first);
        while !taken.insert(number) {
            number = number.wrapping_add(1).max(first);
        }
        number
    };
    wanted.map(one).collect()
}

/// How many want each number: as long as no two want the same, everybody has the one he wants.
#[derive(Clone, Debug, Default)]
pub(super) struct Numbers {
    wanted: BTreeMap<u32, usize>,
    many: usize,
}

impl Numbers {
    pub(super) fn add(&mut self, wanted: u32) {
        *self.wanted.entry(wanted).or_default() += 1;
        self.many += 1;
    }

    pub(super) fn remove(&mut self, wanted: u32) {
        if let Some(many) = self.wanted.get_mut(&wanted) {
            *many -= 1;
            self.many -= 1;
            if *many == 0 {
                self.wanted.remove(&wanted);
            }
        }
    }

    pub(super) fn clash(&self) -> bool {
        self.wanted.len() < self.many
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_depend_on_the_text_alone() {
        let [a, b, none] = ["tag:a", "tag:b", ""].map(wanted_by_class);
        assert!(a != b && b != none && none >= Identity::FIRST.0);
        assert_ne!(wanted_by_rule("a", 0), wanted_by_rule("a", 1));
        assert_eq!(wanted_by_rule("a", 0), wanted_by_rule("a", 0));
    }

    #[test]
    fn who_comes_later_gives_way() {
        let settle = |wanted: &[u32]| settle(wanted.iter().copied(), 5);
        assert_eq!(settle(&[9, 9, 10, 9]), [9, 10, 11, 12]);
        assert_eq!(settle(&[u32::MAX, u32::MAX, 1]), [u32::MAX, 5, 6]);
    }

    #[test]
    fn a_clash_is_known_as_long_as_it_lasts() {
        let mut numbers = Numbers::default();
        numbers.add(7);
        numbers.add(8);
        assert!(!numbers.clash());
        numbers.add(7);
        assert!(numbers.clash());
        numbers.remove(7);
        assert!(!numbers.clash());
    }
}
