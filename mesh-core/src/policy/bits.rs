//! Sets of small numbers: which rules a class matches, which classes a kind reaches.
//!
//! Kept as the words that are not zero, so that few members cost little however large they are,
//! and many cost a bit each.

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub(super) struct Bits(Vec<(usize, u64)>);

const WORD: usize = u64::BITS as usize;

impl Bits {
    pub(super) fn insert(&mut self, member: usize) {
        let (index, bit) = (member / WORD, 1 << (member % WORD));
        // Members come in order as a rule, and then the word is the last.
        let at = match self.0.last() {
            None => 0,
            Some((last, _)) if *last < index => self.0.len(),
            Some(_) => self.0.partition_point(|(known, _)| *known < index),
        };
        match self.0.get_mut(at) {
            Some((known, word)) if *known == index => *word |= bit,
            _ => self.0.insert(at, (index, bit)),
        }
    }

    pub(super) fn remove(&mut self, member: usize) {
        let index = member / WORD;
        let at = self.0.partition_point(|(known, _)| *known < index);
        if let Some((known, word)) = self.0.get_mut(at)
            && *known == index
        {
            *word &= !(1 << (member % WORD));
            // Words that are zero are not kept: equal sets are equal values.
            if *word == 0 {
                self.0.remove(at);
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether some member is in both.
    pub(super) fn meets(&self, other: &Self) -> bool {
        self.both(other).next().is_some()
    }

    pub(super) fn contains(&self, member: usize) -> bool {
        let index = member / WORD;
        let at = self.0.partition_point(|(known, _)| *known < index);
        let word = self.0.get(at).filter(|(known, _)| *known == index);
        word.is_some_and(|(_, word)| word & (1 << (member % WORD)) != 0)
    }

    pub(super) fn union(&mut self, other: &Self) {
        if self.0.is_empty() {
            self.0.clone_from(&other.0);
            return;
        }
        let mut merged: Vec<(usize, u64)> = Vec::with_capacity(self.0.len() + other.0.len());
        let mut theirs = other.0.iter().copied().peekable();
        for &(index, word) in &self.0 {
            while let Some(before) = theirs.next_if(|(known, _)| *known < index) {
                merged.push(before);
            }
            let same = theirs.next_if(|(known, _)| *known == index);
            merged.push((index, word | same.map_or(0, |(_, more)| more)));
        }
        merged.extend(theirs);
        self.0 = merged;
    }

    /// Members of both, ascending.
    pub(super) fn both<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = usize> + 'a {
        let mut theirs = other.0.as_slice();
        self.0.iter().flat_map(move |&(index, word)| {
            // Both ascend, so what was passed need not be looked at again.
            while theirs.first().is_some_and(|(known, _)| *known < index) {
                theirs = &theirs[1..];
            }
            let common = match theirs.first() {
                Some((known, other)) if *known == index => word & other,
                _ => 0,
            };
            members((index, common))
        })
    }

    /// Members that the other has not, ascending.
    pub(super) fn without<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = usize> + 'a {
        self.iter().filter(|member| !other.contains(*member))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().copied().flat_map(members)
    }
}

fn members((index, mut word): (usize, u64)) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        if word == 0 {
            return None;
        }
        let bit = word.trailing_zeros() as usize;
        word &= word - 1;
        Some(index * WORD + bit)
    })
}

impl FromIterator<usize> for Bits {
    fn from_iter<I: IntoIterator<Item = usize>>(members: I) -> Self {
        let mut bits = Self::default();
        for member in members {
            bits.insert(member);
        }
        bits
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn some() -> impl Strategy<Value = BTreeSet<usize>> {
        prop::collection::btree_set(prop_oneof![0_usize..200, 0_usize..100_000], 0..20)
    }

    proptest! {
        #[test]
        fn bits_are_a_set(a in some(), b in some(), probe in 0_usize..200) {
            let [x, y]: [Bits; 2] = [&a, &b].map(|set| set.iter().rev().copied().collect());
            prop_assert_eq!(&x.iter().collect::<BTreeSet<_>>(), &a);
            prop_assert_eq!(x.contains(probe), a.contains(&probe));
            let both: Vec<usize> = a.intersection(&b).copied().collect();
            prop_assert_eq!(x.both(&y).collect::<Vec<_>>(), &both[..]);
            let rest: Vec<usize> = a.difference(&b).copied().collect();
            prop_assert_eq!(x.without(&y).collect::<Vec<_>>(), rest);
            prop_assert_eq!(x.meets(&y), !both.is_empty());
            let mut without = x.clone();
            without.remove(probe);
            prop_assert_eq!(without, a.iter().copied().filter(|member| *member != probe).collect::<Bits>());
            let mut union = x;
            union.union(&y);
            prop_assert_eq!(union.iter().collect::<Vec<_>>(), a.union(&b).copied().collect::<Vec<_>>());
        }
    }
}
