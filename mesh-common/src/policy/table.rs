//! The array of buckets, as the agent fills it.
//!
//! What is hard is to leave no trace of what goes: a row is taken out of every bucket's count that it
//! passed over when it came, so it must still be known which.

use super::bucket::{Bucket, FIRST, REACH, WIDTH, hash};
use super::{Row, RowKey};

/// A row's bucket is full, and all within its reach: the array is too small.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NoRoom;

/// The whole array, as the agent fills it.
#[derive(Debug)]
pub struct Table<'a> {
    slots: &'a mut [Bucket],
    mask: u32,
}

impl<'a> Table<'a> {
    /// Slots for so many rows, of which nearly all will lie where they hash to.
    pub fn slots(rows: usize) -> usize {
        let buckets = (rows * 5 / 8).next_power_of_two();
        buckets.max(REACH as usize) + FIRST as usize
    }

    /// Of a power of two of slots and one more, all zero, or a table already.
    pub fn new(slots: &'a mut [Bucket]) -> Self {
        let mask = (slots.len() as u32).saturating_sub(FIRST + 1);
        if let Some(first) = slots.first_mut() {
            first.beyond = mask;
        }
        Self { slots, mask }
    }

    /// Puts the row there, or in place of the one that is. On an error nothing has changed.
    pub fn insert(&mut self, at: RowKey, row: Row) -> Result<(), NoRoom> {
        if let Some((passed, index)) = self.position(&at) {
            self.bucket(&at, passed).rows[index] = row;
            return Ok(());
        }
        let free = |passed| Some((passed, self.bucket(&at, passed).room()?));
        let (passed, index) = (0..REACH).find_map(free).ok_or(NoRoom)?;
        for full in 0..passed {
            self.bucket(&at, full).beyond += 1;
        }
        let bucket = self.bucket(&at, passed);
        (bucket.ends[index], bucket.about[index]) = (at.ends, at.about);
        bucket.rows[index] = row;
        Ok(())
    }

    pub fn remove(&mut self, at: &RowKey) {
        if let Some((passed, index)) = self.position(at) {
            for full in 0..passed {
                self.bucket(at, full).beyond -= 1;
            }
            let bucket = self.bucket(at, passed);
            (bucket.ends[index], bucket.about[index]) = (0, 0);
            bucket.rows[index] = Row::NOTHING;
        }
    }

    /// How many buckets a row has passed over, and where it lies in its own.
    fn position(&mut self, at: &RowKey) -> Option<(u32, usize)> {
        (0..REACH).find_map(|passed| Some((passed, self.bucket(at, passed).position(at)?)))
    }

    fn bucket(&mut self, at: &RowKey, passed: u32) -> &mut Bucket {
        let place = hash(at).wrapping_add(passed * (passed + 1) / 2) & self.mask;
        &mut self.slots[(FIRST + place) as usize]
    }
}

impl Bucket {
    fn position(&self, at: &RowKey) -> Option<usize> {
        let is_at = |index: usize| self.ends[index] == at.ends && self.about[index] == at.about;
        (0..WIDTH).find(|index| is_at(*index) && self.rows[*index].speaks())
    }

    fn room(&self) -> Option<usize> {
        self.rows.iter().position(|row| !row.speaks())
    }
}
