//! Programs on hooks and keys of maps by the bare bpf(2), for which aya has no calls.

use std::io;
use std::mem::zeroed;
use std::os::fd::{AsFd, BorrowedFd};

use aya::Pod;
use aya::maps::{MapData, MapError, MapType};

use super::number;

/// `BPF_PROG_QUERY` of `enum bpf_cmd`.
const BPF_PROG_QUERY: libc::c_int = 16;

/// The `query` arm of `union bpf_attr`, up to what TCX needs.
#[repr(C)]
#[derive(Default)]
struct ProgQuery {
    target_ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    pad: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// Ids of the programs at an interface's TCX hook (`BPF_TCX_INGRESS` is 46, `BPF_TCX_EGRESS` 47), in
/// the order in which they run, and a number that grows by one with each change and starts anew with a hook that was empty. aya's own query turns ids into descriptors,
/// which takes CAP_SYS_ADMIN.
pub(crate) fn prog_query(ifindex: u32, attach_type: u32) -> io::Result<(Vec<u32>, u64)> {
    let mut ids = [0_u32; 64];
    let mut query = ProgQuery {
        target_ifindex: ifindex,
        attach_type,
        prog_ids: (&raw mut ids).addr() as u64,
        prog_cnt: ids.len() as u32,
        ..ProgQuery::default()
    };
    // SAFETY: the kernel reads and writes at most the size given of `query`, and `prog_cnt` ids at
    // `prog_ids`; both outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_QUERY,
            &raw mut query,
            size_of::<ProgQuery>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let ids = ids.into_iter().take(query.prog_cnt as usize);
    Ok((ids.collect(), query.revision))
}

/// `BPF_MAP_GET_NEXT_KEY` of `enum bpf_cmd`.
const BPF_MAP_GET_NEXT_KEY: libc::c_int = 4;

/// The arm of `union bpf_attr` for elements of maps.
#[repr(C)]
#[derive(Default)]
struct MapElement {
    map_fd: u32,
    pad: u32,
    key: u64,
    next_key: u64,
}

/// How many keys of `key_size` bytes a map has, up to `most`: keys that come and go while they are
/// counted could keep one counting for ever.
pub(crate) fn map_count(map: impl AsFd, key_size: u32, most: u32) -> io::Result<u32> {
    // The kernel reads and writes as many bytes as its keys have, whatever the caller believes.
    const LONGEST: usize = 512;
    if key_size == 0 || key_size as usize > LONGEST {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let (mut key, mut next) = ([0_u8; LONGEST], [0_u8; LONGEST]);
    for count in 0..most {
        let element = MapElement {
            map_fd: number(map.as_fd()),
            key: if count == 0 {
                0
            } else {
                (&raw const key).addr() as u64
            },
            next_key: (&raw mut next).addr() as u64,
            ..MapElement::default()
        };
        // SAFETY: a key is at most 512 bytes long (MAX_BPF_STACK), as long as both buffers, which
        // outlive the call; the kernel reads the size given of `element`.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_MAP_GET_NEXT_KEY,
                &raw const element,
                size_of::<MapElement>(),
            )
        };
        if result < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::NotFound => Ok(count),
                _ => Err(error),
            };
        }
        key = next;
    }
    Ok(most)
}

/// `BPF_MAP_LOOKUP_BATCH` of `enum bpf_cmd` (Linux 5.6).
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
/// No value is read while a program holds its lock.
const BPF_F_LOCK: u64 = 4;

/// The `batch` arm of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct MapBatch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Calls `each` with every value of an array, or of a hash table that has one value for all CPUs. `locked`: the
/// values have locks. What comes and goes meanwhile may be missed; nothing is seen twice for it.
pub(crate) fn values<K: Pod, V: Pod>(
    map: &MapData,
    locked: bool,
    mut each: impl FnMut(&V),
) -> Result<(), MapError> {
    let info = map.info()?;
    // The kernel writes as much as its own keys and values have, whatever the caller believes.
    if info.key_size() as usize != size_of::<K>() || info.value_size() as usize != size_of::<V>() {
        return Err(MapError::InvalidValueSize {
            size: size_of::<V>(),
            expected: info.value_size() as usize,
        });
    }
    if !matches!(info.map_type()?, MapType::Array | MapType::Hash) {
        return Err(MapError::InvalidMapType {
            map_type: info.map_type()? as u32,
        });
    }
    // Values that are copied in one go.
    const STEP: usize = 256;
    // SAFETY: any bytes are a `K`, and a `V`.
    let (mut keys, mut values) = unsafe { (vec![zeroed::<K>(); STEP], vec![zeroed::<V>(); STEP]) };
    let mut next = 0_u32;
    let mut is_first = true;
    loop {
        let position = (&raw mut next).addr() as u64;
        let mut batch = MapBatch {
            in_batch: if is_first { 0 } else { position },
            out_batch: position,
            keys: keys.as_mut_ptr().addr() as u64,
            values: values.as_mut_ptr().addr() as u64,
            count: STEP as u32,
            map_fd: number(map.fd().as_fd()),
            elem_flags: if locked { BPF_F_LOCK } else { 0 },
            flags: 0,
        };
        // SAFETY: keys are as large as a `K` and values as a `V`, which any bytes make one, as those of these two
        // kinds of maps are one for all CPUs; a position is four bytes. The kernel writes at most `count` of each,
        // and all outlive the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_MAP_LOOKUP_BATCH,
                &raw mut batch,
                size_of::<MapBatch>(),
            )
        };
        let error = (result < 0).then(io::Error::last_os_error);
        let is_last = error
            .as_ref()
            .is_some_and(|error| error.kind() == io::ErrorKind::NotFound);
        if let Some(error) = error.filter(|_| !is_last) {
            return Err(MapError::IoError(error));
        }
        values.iter().take(batch.count as usize).for_each(&mut each);
        if is_last {
            return Ok(());
        }
        is_first = false;
    }
}

/// `BPF_PROG_ATTACH` and `BPF_PROG_DETACH` of `enum bpf_cmd`.
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_DETACH: libc::c_int = 9;
/// In the place of `replace_bpf_fd`.
const BPF_F_REPLACE: u32 = 1 << 2;
/// Before all others, as no other is named.
const BPF_F_BEFORE: u32 = 1 << 3;
/// Behind the program that `relative_fd` names.
const BPF_F_AFTER: u32 = 1 << 4;

/// The arm of `union bpf_attr` for attaching and detaching.
#[repr(C)]
#[derive(Default)]
struct ProgAttach {
    target_ifindex: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
    relative_fd: u32,
    expected_revision: u64,
}

/// Hangs `program` at an interface's TCX hook: in the place of `old`, or before all others. It stays
/// there by itself, without descriptor and pin, until it is detached or the interface goes.
pub(crate) fn prog_attach(
    ifindex: u32,
    attach_type: u32,
    program: impl AsFd,
    old: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let (attach_flags, replace_bpf_fd) = match old {
        Some(old) => (BPF_F_REPLACE, number(old)),
        None => (BPF_F_BEFORE, 0),
    };
    let attach = ProgAttach {
        target_ifindex: ifindex,
        attach_bpf_fd: number(program.as_fd()),
        attach_type,
        attach_flags,
        replace_bpf_fd,
        ..ProgAttach::default()
    };
    change(BPF_PROG_ATTACH, &attach)
}

/// Takes `program` from an interface's TCX hook.
pub(crate) fn prog_detach(ifindex: u32, attach_type: u32, program: impl AsFd) -> io::Result<()> {
    let attach = ProgAttach {
        target_ifindex: ifindex,
        attach_bpf_fd: number(program.as_fd()),
        attach_type,
        ..ProgAttach::default()
    };
    change(BPF_PROG_DETACH, &attach)
}

/// Takes the program off that hangs right behind `program`, whichever it is, if nothing has changed since
/// `revision`: ESTALE otherwise. It needs no descriptor of it.
pub(crate) fn prog_detach_behind(
    ifindex: u32,
    attach_type: u32,
    program: impl AsFd,
    revision: u64,
) -> io::Result<()> {
    let attach = ProgAttach {
        target_ifindex: ifindex,
        attach_type,
        attach_flags: BPF_F_AFTER,
        relative_fd: number(program.as_fd()),
        expected_revision: revision,
        ..ProgAttach::default()
    };
    change(BPF_PROG_DETACH, &attach)
}

fn change(command: libc::c_int, attach: &ProgAttach) -> io::Result<()> {
    // SAFETY: the kernel reads the size given of `attach`, which outlives the call, and takes numbers
    // from it; what is no descriptor of a program it refuses.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            &raw const *attach,
            size_of::<ProgAttach>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
