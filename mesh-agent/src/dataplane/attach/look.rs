//! What hangs at a hook, and what a second look at it does not show.
//!
//! The kernel numbers the states of a TCX hook. Each attachment, detachment and replacement takes one
//! number, so when more numbers have gone by than the two lists tell apart, something came and went. The numbers
//! start anew when the hook was empty: whoever takes ours off and hangs it there again within one look goes
//! unnoticed, as may one who replaces others in the same moment.

use std::collections::BTreeSet;

/// What hung at a hook when it was looked at.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Look {
    /// Programs in the order in which they run. `None`: a filter that is no program, or is not where ours
    /// would be.
    pub(super) ids: Vec<Option<u32>>,
    /// `revision` of `BPF_PROG_QUERY`; 0 where the kernel has none.
    pub(super) revision: u64,
}

impl Look {
    /// Whether something was here between the two that neither shows.
    pub(super) fn hides_a_visit_since(&self, before: &Self) -> bool {
        let (old, new): (BTreeSet<_>, BTreeSet<_>) =
            (before.ids.iter().collect(), self.ids.iter().collect());
        let gone = old.difference(&new).count() as u64;
        let come = new.difference(&old).count() as u64;
        // One that takes another's place is gone and come in one step. A hook that was empty in between
        // counts anew.
        let steps = self.revision.wrapping_sub(before.revision);
        !(gone.max(come)..=gone + come).contains(&steps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_and_went_is_noticed_and_what_came_or_went_is_not_taken_for_it() {
        let look = |ids: &[u32], revision| Look {
            ids: ids.iter().copied().map(Some).collect(),
            revision,
        };
        let visited = |before: &Look, after: &Look| after.hides_a_visit_since(before);
        let alone = look(&[7], 5);
        assert!(!visited(&alone, &alone));
        assert!(visited(&alone, &look(&[7], 7)), "came and went");
        assert!(
            visited(&alone, &look(&[7], 6)),
            "took our place for a while"
        );
        assert!(!visited(&alone, &look(&[7, 8], 6)), "came behind");
        assert!(!visited(&look(&[7, 8], 6), &look(&[7], 7)), "went");
        assert!(!visited(&look(&[7, 8], 6), &look(&[7, 9], 7)), "replaced");
        assert!(
            !visited(&look(&[7, 8], 6), &look(&[7, 9], 8)),
            "one after the other"
        );
        assert!(visited(&look(&[7, 8], 6), &look(&[7, 9], 9)), "and a third");
        assert!(visited(&alone, &look(&[7], 2)), "everything was taken off");
    }
}
