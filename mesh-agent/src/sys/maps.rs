//! Arrays of the kernel that user space writes through its own memory, for which aya has no calls.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::ptr::{self, NonNull};

use aya::Pod;
use aya::maps::{ArrayOfMaps, Map, MapData, MapError};
use rustix::mm::{MapFlags, ProtFlags};

/// Of `enum bpf_cmd`.
const BPF_MAP_CREATE: libc::c_int = 0;

const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_MAP_TYPE_ARRAY_OF_MAPS: u32 = 12;

/// The arm of `union bpf_attr` for making a map, up to what these need.
#[repr(C)]
#[derive(Default)]
struct Create {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
}

impl Create {
    fn make(&self) -> Result<MapData, MapError> {
        // SAFETY: the kernel reads the size given of `self`, which outlives the call, and takes
        // numbers from it.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_MAP_CREATE,
                ptr::from_ref(self),
                size_of::<Self>(),
            )
        };
        let fd = i32::try_from(fd).unwrap_or(-1);
        if fd < 0 {
            return Err(MapError::IoError(io::Error::last_os_error()));
        }
        // SAFETY: a new descriptor, which nobody else knows.
        MapData::from_fd(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// Returns when every program that runs now has ended: for that the kernel waits after each change of a
/// map of maps (`maybe_wait_bpf_programs`), also of one that nobody else knows.
pub(crate) fn wait_for_programs() -> Result<(), MapError> {
    let inner = Create {
        map_type: BPF_MAP_TYPE_ARRAY,
        key_size: size_of::<u32>() as u32,
        value_size: size_of::<u64>() as u32,
        max_entries: 1,
        ..Create::default()
    };
    let inner = inner.make()?;
    let outer = Create {
        map_type: BPF_MAP_TYPE_ARRAY_OF_MAPS,
        key_size: size_of::<u32>() as u32,
        value_size: size_of::<u32>() as u32,
        max_entries: 1,
        inner_map_fd: inner.fd().as_fd().as_raw_fd().cast_unsigned(),
        ..Create::default()
    };
    let mut outer: ArrayOfMaps<MapData, MapData> = Map::ArrayOfMaps(outer.make()?).try_into()?;
    outer.set(0, &inner, 0)
}

/// An array that we have made, of which all is zero at first. Programs may read it; nobody else has it
/// in memory.
#[derive(Debug)]
pub(crate) struct Array<T> {
    data: MapData,
    slots: NonNull<T>,
    len: usize,
}

// SAFETY: it owns its memory, as a box does.
unsafe impl<T: Send> Send for Array<T> {}

impl<T: Pod> Array<T> {
    /// `flags` are the `BPF_F_*` of `linux/bpf.h`; with `BPF_F_MMAPABLE` (Linux 5.5).
    pub(crate) fn create(len: u32, flags: u32) -> Result<Self, MapError> {
        // The kernel lays elements out in steps of eight bytes.
        const { assert!(size_of::<T>() > 0 && size_of::<T>().is_multiple_of(8)) };
        let create = Create {
            map_type: BPF_MAP_TYPE_ARRAY,
            key_size: size_of::<u32>() as u32,
            value_size: size_of::<T>() as u32,
            max_entries: len,
            map_flags: flags,
            ..Create::default()
        };
        let data = create.make()?;
        let len = len as usize;
        // SAFETY: new memory, at a place of the kernel's choice.
        let slots = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                len * size_of::<T>(),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                data.fd().as_fd(),
                0,
            )
        };
        let slots = slots.map_err(|error| MapError::IoError(error.into()))?;
        let slots = NonNull::new(slots.cast()).ok_or(MapError::OutOfBounds {
            index: 0,
            max_entries: 0,
        })?;
        Ok(Self { data, slots, len })
    }

    /// All of it, for whoever knows that no program reads it meanwhile.
    pub(crate) fn slots(&mut self) -> &mut [T] {
        // SAFETY: so many elements are mapped, page-aligned, any bytes are a `T`, and we hold them alone.
        unsafe { std::slice::from_raw_parts_mut(self.slots.as_ptr(), self.len) }
    }
}

impl<T> Array<T> {
    pub(crate) fn data(&self) -> &MapData {
        &self.data
    }
}

impl<T> Drop for Array<T> {
    fn drop(&mut self) {
        // SAFETY: mapped when it was made, with this size, and nobody borrows it any more. It cannot fail
        // for a mapping that is there.
        let _ =
            unsafe { rustix::mm::munmap(self.slots.as_ptr().cast(), self.len * size_of::<T>()) };
    }
}
