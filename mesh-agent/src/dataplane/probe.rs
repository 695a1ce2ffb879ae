//! What this build and this kernel can do.

use std::io;
use std::path::Path;

use aya::util::KernelVersion;

/// The object that this build carries.
#[cfg(mesh_ebpf_embedded)]
pub(super) const EMBEDDED: Option<&[u8]> =
    Some(aya::include_bytes_aligned!(env!("MESH_EBPF_OBJECT_PATH")));
#[cfg(not(mesh_ebpf_embedded))]
pub(super) const EMBEDDED: Option<&[u8]> = None;

/// False: the agent was built without `cargo xtask build-ebpf`, and filters in process.
pub fn has_object() -> bool {
    EMBEDDED.is_some()
}

/// TCX came with Linux 6.6; before it, programs hang on a clsact qdisc.
pub fn has_tcx() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0))
}

/// `BPF_FS_MAGIC` of `linux/magic.h`.
const BPF_FS: u32 = 0xcafe_4a11;

/// Whether `path`, which must exist, lies on a BPF file system: only there links and maps can be kept.
pub fn is_bpffs(path: &Path) -> io::Result<bool> {
    let stat = rustix::fs::statfs(path)?;
    Ok(stat.f_type as u32 == BPF_FS)
}
