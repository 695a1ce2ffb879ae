//! Rows in buckets of one cache line: what a new flow asks for is found in one miss.
//!
//! A hash map of the kernel costs two, one for the bucket and one for the element, and the hashing of a
//! helper on top. Here the agent fills an array that nobody looks into, until the generation says that it is in
//! use, so no look-up ever meets a change.
//!
//! A row that finds its bucket full goes on to another, and is counted in each that it passed over
//! ([`Bucket::beyond`]); so a look-up knows where to stop, and a row that goes leaves no trace.

use super::{Row, RowKey};

/// Rows of a bucket.
pub(super) const WIDTH: usize = 3;
/// Buckets in which a row may lie: the one that it hashes to, and others at the distance of a triangular
/// number, so that neighbours that are full do not fill each other up. No two of them are one, where there
/// are so many at all.
pub(super) const REACH: u32 = 8;
/// The slot of the first bucket. The one before holds no rows, and [`Bucket::mask`].
pub(super) const FIRST: u32 = 1;

/// One slot of the array. All zero, as the kernel makes it, it holds no row.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bucket {
    pub(super) ends: [u64; WIDTH],
    pub(super) about: [u32; WIDTH],
    pub(super) rows: [Row; WIDTH],
    /// Rows that have passed over this bucket.
    pub(super) beyond: u32,
}

impl Bucket {
    pub const EMPTY: Self = Self {
        ends: [0; WIDTH],
        about: [0; WIDTH],
        rows: [Row::NOTHING; WIDTH],
        beyond: 0,
    };

    /// Of the array's first slot: the number of buckets, a power of two, less one.
    #[inline(always)]
    pub const fn mask(&self) -> u32 {
        self.beyond
    }

    /// The row under `at`, or [`Row::NOTHING`]; `None` if it may lie in another bucket.
    #[inline(always)]
    fn row(&self, at: &RowKey) -> Option<Row> {
        let mut index = 0;
        while index < WIDTH {
            if self.about[index] == at.about && self.ends[index] == at.ends {
                return Some(self.rows[index]);
            }
            index += 1;
        }
        (self.beyond == 0).then_some(Row::NOTHING)
    }
}

/// The bucket that a row hashes to, before the mask: multiplicative hashing (Knuth, TAOCP 3, 6.4), in two
/// rounds.
#[inline(always)]
pub(super) const fn hash(at: &RowKey) -> u32 {
    let mixed = at.ends.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ mixed >> 32 ^ at.about as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed >> 32) as u32
}

/// The row under `at` or [`Row::NOTHING`], where `slot` gives the array's slots and `mask` is [`Bucket::mask`]; `None`
/// if it may lie in another bucket than it hashes to.
#[inline(always)]
pub fn near<'a>(at: &RowKey, mask: u32, slot: impl Fn(u32) -> Option<&'a Bucket>) -> Option<Row> {
    match slot(FIRST + (hash(at) & mask)) {
        Some(bucket) => bucket.row(at),
        None => Some(Row::NOTHING),
    }
}

/// The same, wherever it lies.
#[inline(always)]
pub fn find<'a>(at: &RowKey, mask: u32, slot: impl Fn(u32) -> Option<&'a Bucket>) -> Row {
    let mut place = hash(at);
    let mut passed = 0;
    while passed != REACH {
        let Some(bucket) = slot(FIRST + (place & mask)) else {
            break;
        };
        if let Some(row) = bucket.row(at) {
            return row;
        }
        passed += 1;
        place = place.wrapping_add(passed);
    }
    Row::NOTHING
}

const _: () = assert!(size_of::<Bucket>() == 64);
