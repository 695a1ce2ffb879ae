//! One policy in a map of its own.
//!
//! Another takes its place as a whole, so it is as large as what it holds asks for, and nobody looks
//! into it while it is written.

use aya::maps::{MapData, MapError};
use mesh_common::maps::POLICY_FLAGS;
use mesh_common::policy::{Bucket, NoRoom, Table};
use mesh_core::dataplane::RowWrite;

use crate::sys::maps::Array;

#[derive(Debug)]
pub(super) struct Policy {
    slots: Array<Bucket>,
}

impl Policy {
    /// Of these rows, with room for a few more.
    pub(super) fn of(rows: &[RowWrite]) -> Result<Self, MapError> {
        let mut room = rows.len();
        loop {
            let slots = u32::try_from(Table::slots(room)).unwrap_or(u32::MAX);
            let mut policy = Self {
                slots: Array::create(slots, POLICY_FLAGS)?,
            };
            match policy.write(rows) {
                Ok(()) => return Ok(policy),
                Err(NoRoom) => room = 2 * room.max(1),
            }
        }
    }

    pub(super) fn map(&self) -> &MapData {
        self.slots.data()
    }

    /// On an error some of it is written, and it is of no use any more. Not for the one in use.
    pub(super) fn write(&mut self, writes: &[RowWrite]) -> Result<(), NoRoom> {
        let mut table = Table::new(self.slots.slots());
        // First, as it makes room.
        for gone in writes.iter().filter(|write| write.row.is_none()) {
            table.remove(&gone.at);
        }
        for write in writes {
            if let Some(row) = write.row {
                table.insert(write.at, row)?;
            }
        }
        Ok(())
    }
}
