//! One policy in a map of its own.
//!
//! There are two, of which one is in use: the other is as large as what it holds asks for, and nobody looks
//! into it while it is written.

use std::io;

use aya::maps::{MapData, MapError};
use mesh_common::maps::POLICY_FLAGS;
use mesh_common::policy::{Bucket, NoRoom, Table};
use mesh_core::dataplane::RowWrite;

use crate::sys::maps::Array;

/// How often a table is made twice as large before its rows are taken for ones that no table can hold.
const MOST_DOUBLED: u32 = 4;

#[derive(Debug)]
pub(super) struct Policy {
    slots: Array<Bucket>,
}

impl Policy {
    /// Of these rows, with room for a few more.
    pub(super) fn of(rows: &[RowWrite]) -> Result<Self, MapError> {
        // Where rows hash to the same few buckets, more of them help.
        for more in 0..=MOST_DOUBLED {
            let slots = Table::slots(rows.len().max(1) << more);
            let mut policy = Self {
                slots: Array::create(u32::try_from(slots).unwrap_or(u32::MAX), POLICY_FLAGS)?,
            };
            if policy.write(rows).is_ok() {
                return Ok(policy);
            }
        }
        Err(MapError::IoError(io::ErrorKind::StorageFull.into()))
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
