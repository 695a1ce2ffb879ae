//! What differs between two sorted maps, found by walking them side by side: a look-up of every key in
//! the other one takes many times as long when there are hundreds of thousands.

use std::cmp::Ordering;
use std::collections::BTreeMap;

/// The keys that are not the same in both, in order, and what `new` has of each: `None` where it has nothing.
pub(crate) fn changes<'a, K: Ord, V: PartialEq>(
    old: &'a BTreeMap<K, V>,
    new: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, Option<&'a V>)> {
    let mut old = old.iter().peekable();
    let mut new = new.iter().peekable();
    std::iter::from_fn(move || {
        loop {
            let order = match (old.peek(), new.peek()) {
                (Some((one, _)), Some((other, _))) => one.cmp(other),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (None, None) => return None,
            };
            match order {
                Ordering::Less => return old.next().map(|(key, _)| (key, None)),
                Ordering::Greater => return new.next().map(|(key, value)| (key, Some(value))),
                Ordering::Equal => {
                    let (_, before) = old.next()?;
                    let (key, after) = new.next()?;
                    if before != after {
                        return Some((key, Some(after)));
                    }
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::collection::btree_map;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Few keys and values, so that all that can meet does.
        #[test]
        fn they_lead_from_the_old_to_the_new_and_name_nothing_else(
            old in btree_map(0_u8..8, 0_u8..3, 0..8),
            new in btree_map(0_u8..8, 0_u8..3, 0..8),
        ) {
            let mut led = old.clone();
            let mut last = None;
            for (key, value) in changes(&old, &new) {
                prop_assert!(last.replace(key) < Some(key), "in order, each once");
                prop_assert_ne!(old.get(key), value);
                match value {
                    Some(value) => led.insert(*key, *value),
                    None => led.remove(key),
                };
            }
            prop_assert_eq!(led, new);
        }
    }
}
