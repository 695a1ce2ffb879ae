//! Hash maps of the kernel, made and written many elements at a time, for which aya has no calls.
//!
//! The kernel reads as many bytes for each element as the map was made with, so only [`HashMap`], which
//! remembers it by its type, may pass it arrays.

use std::io;
use std::marker::PhantomData;
use std::mem::size_of;
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd};

use aya::Pod;
use aya::maps::{MapData, MapError};

use super::number;

/// Of `enum bpf_cmd`.
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_BATCH: libc::c_int = 26;
const BPF_MAP_DELETE_BATCH: libc::c_int = 27;

const BPF_MAP_TYPE_HASH: u32 = 1;

/// The arm of `union bpf_attr` for making a map, up to what a hash map needs.
#[repr(C)]
#[derive(Default)]
struct Create {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
}

/// The arm of `union bpf_attr` for many elements at a time.
#[repr(C)]
#[derive(Default)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// A map from `K` to `V` that we have made.
#[derive(Debug)]
pub(crate) struct HashMap<K, V> {
    data: MapData,
    elements: PhantomData<(K, V)>,
}

impl<K: Pod, V: Pod> HashMap<K, V> {
    /// `flags` are the `BPF_F_*` of `linux/bpf.h`.
    pub(crate) fn create(max_entries: u32, flags: u32) -> Result<Self, MapError> {
        let create = Create {
            map_type: BPF_MAP_TYPE_HASH,
            key_size: size_of::<K>() as u32,
            value_size: size_of::<V>() as u32,
            max_entries,
            map_flags: flags,
            ..Create::default()
        };
        // SAFETY: the kernel reads the size given of `create`, which outlives the call, and takes
        // numbers from it.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_MAP_CREATE,
                &raw const create,
                size_of::<Create>(),
            )
        };
        let fd = i32::try_from(fd).unwrap_or(-1);
        if fd < 0 {
            return Err(MapError::IoError(io::Error::last_os_error()));
        }
        // SAFETY: a new descriptor, which nobody else knows.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self {
            data: MapData::from_fd(fd)?,
            elements: PhantomData,
        })
    }

    pub(crate) fn data(&self) -> &MapData {
        &self.data
    }

    /// Puts each value under its key, in this order.
    pub(crate) fn insert_all(&self, keys: &[K], values: &[V]) -> io::Result<()> {
        let most = keys.len().min(values.len());
        let mut done = 0;
        while done < most {
            match self.batch(BPF_MAP_UPDATE_BATCH, &keys[done..most], &values[done..most]) {
                (_, Ok(())) => return Ok(()),
                // The kernel takes elements from a stock of each CPU, which an interrupt fills up.
                (some, Err(error)) if some > 0 && error.kind() == io::ErrorKind::OutOfMemory => {
                    done += some;
                }
                (_, Err(error)) => return Err(error),
            }
        }
        Ok(())
    }

    /// Removes the keys that are there.
    pub(crate) fn remove_all(&self, keys: &[K]) -> io::Result<()> {
        let mut done = 0;
        while done < keys.len() {
            match self.batch(BPF_MAP_DELETE_BATCH, &keys[done..], &[]) {
                (_, Ok(())) => return Ok(()),
                (some, Err(error)) if error.kind() == io::ErrorKind::NotFound => done += some + 1,
                (_, Err(error)) => return Err(error),
            }
        }
        Ok(())
    }

    /// How many elements were done, and why not the next. `values` has as many elements as `keys`, or the
    /// command reads none.
    fn batch(&self, command: libc::c_int, keys: &[K], values: &[V]) -> (usize, io::Result<()>) {
        let mut batch = Batch {
            keys: keys.as_ptr().addr() as u64,
            values: values.as_ptr().addr() as u64,
            count: u32::try_from(keys.len()).unwrap_or(u32::MAX),
            map_fd: number(self.data.fd().as_fd()),
            ..Batch::default()
        };
        // SAFETY: the kernel reads and writes the size given of `batch`, and reads `count` keys and
        // values of the sizes that the map was made with, which are those of `K` and `V`; all outlive
        // the call.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut batch, size_of::<Batch>()) };
        if result < 0 {
            return (batch.count as usize, Err(io::Error::last_os_error()));
        }
        (keys.len(), Ok(()))
    }
}
