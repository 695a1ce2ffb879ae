//! How full the maps are, and how much memory they take.
//!
//! Keys are counted one by one, so this is for people and not for every second.

use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _};

use anyhow::Context as _;
use aya::maps::MapData;

use super::pins::Pins;
use crate::sys;

/// One map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Usage {
    pub map: &'static str,
    pub entries: u64,
    /// Of a ring buffer, bytes.
    pub capacity: u64,
    /// As the kernel accounts for it.
    pub memory_bytes: u64,
}

impl Pins {
    pub(super) fn usage(&self) -> anyhow::Result<Vec<Usage>> {
        let usage = |(map, data): &(&'static str, MapData)| -> anyhow::Result<Usage> {
            let info = data.info()?;
            let fd = data.fd().as_fd();
            let most = info.max_entries().saturating_mul(2);
            // A ring buffer has no keys.
            let entries = match info.key_size() {
                0 => 0,
                size => sys::bpf::map_count(fd, size, most)?,
            };
            Ok(Usage {
                map,
                entries: entries.into(),
                capacity: info.max_entries().into(),
                memory_bytes: memory(data)?,
            })
        };
        self.maps().iter().map(usage).collect()
    }
}

/// What a map takes, as the kernel accounts for it.
pub(super) fn memory(map: &MapData) -> anyhow::Result<u64> {
    let path = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let memory = text.lines().find_map(|line| line.strip_prefix("memlock:"));
    Ok(memory.and_then(|m| m.trim().parse().ok()).unwrap_or(0))
}
