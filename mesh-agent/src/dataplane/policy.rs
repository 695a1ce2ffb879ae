//! One policy in a map of its own.
//!
//! Another takes its place as a whole, so it is as large as what it holds asks for, and nobody looks
//! into it while it is written.

use std::io;

use aya::maps::{MapData, MapError};
use mesh_common::policy::{Row, RowKey};
use mesh_core::dataplane::RowWrite;

use crate::sys::maps::HashMap;

/// `BPF_F_NO_PREALLOC`: memory is taken only for what is there.
const NO_PREALLOC: u32 = 1;

#[derive(Debug)]
pub(super) struct Policy {
    map: HashMap<RowKey, Row>,
    /// Rows, in the sense of mesh-core, that fit in for sure.
    room: usize,
}

impl Policy {
    /// Empty, with room for so many rows.
    pub(super) fn create(rows: usize) -> Result<Self, MapError> {
        // Each may bring another, which speaks for its ends. A power of two is what the kernel makes of
        // the number of its buckets.
        let room = rows.max(512).next_power_of_two();
        let capacity = u32::try_from(2 * room).unwrap_or(u32::MAX);
        Ok(Self {
            map: HashMap::create(capacity, NO_PREALLOC)?,
            room,
        })
    }

    pub(super) fn has_room(&self, rows: usize) -> bool {
        rows <= self.room
    }

    pub(super) fn map(&self) -> &MapData {
        self.map.data()
    }

    /// On an error some of it may be written, and it is of no use any more.
    pub(super) fn write(&self, writes: &[RowWrite]) -> io::Result<()> {
        let (mut keys, mut rows, mut gone) = (Vec::new(), Vec::new(), Vec::new());
        for write in writes {
            match write.row {
                Some(row) => {
                    keys.push(write.at);
                    rows.push(row);
                }
                None => gone.push(write.at),
            }
        }
        // First, as it makes room.
        self.map.remove_all(&gone)?;
        self.map.insert_all(&keys, &rows)
    }
}
