//! Finds the BPF object to embed; never builds it (a nested cargo would wait for the lock of the outer).
//!
//! `$MESH_EBPF_OBJECT` if set, else what `cargo xtask build-ebpf` left in `target/ebpf` if its sources
//! are the ones that lie here, else none: then the agent filters in process and says so.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

use sha2::{Digest, Sha256};

fn main() -> io::Result<()> {
    println!("cargo::rustc-check-cfg=cfg(mesh_ebpf_embedded)");
    println!("cargo::rerun-if-env-changed=MESH_EBPF_OBJECT");
    println!("cargo::rerun-if-changed=build.rs");
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let object = match env::var_os("MESH_EBPF_OBJECT") {
        Some(path) => Some(PathBuf::from(path)),
        None => built(&root)?,
    };
    if let Some(object) = object {
        let object = fs::canonicalize(object)?;
        println!("cargo::rerun-if-changed={}", object.display());
        println!(
            "cargo::rustc-env=MESH_EBPF_OBJECT_PATH={}",
            object.display()
        );
        println!("cargo::rustc-cfg=mesh_ebpf_embedded");
    }
    Ok(())
}

/// The object in `target/ebpf`, if it was built from what lies here.
fn built(root: &Path) -> io::Result<Option<PathBuf>> {
    let folder = root.join("target/ebpf");
    let stamp = folder.join("mesh-ebpf.o.sha256");
    // cargo runs this script again on every build while a watched file is missing; an empty stamp
    // matches nothing and makes it wait until somebody builds the object.
    if !stamp.exists() {
        fs::create_dir_all(&folder)?;
        fs::write(&stamp, "")?;
    }
    println!("cargo::rerun-if-changed={}", stamp.display());
    let sources = sources(root)?;
    let mut hash = Sha256::new();
    for name in &sources {
        let path = root.join(name);
        println!("cargo::rerun-if-changed={}", path.display());
        hash.update(name);
        hash.update([0]);
        hash.update(fs::read(path)?);
    }
    let wanted: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    let object = folder.join("mesh-ebpf.o");
    let fits = fs::read_to_string(&stamp)?.trim() == wanted && object.exists();
    Ok(fits.then_some(object))
}

/// What the object is made of, by path from the root, in order.
fn sources(root: &Path) -> io::Result<Vec<String>> {
    let manifests = [
        "mesh-ebpf/Cargo.toml",
        "mesh-ebpf/Cargo.lock",
        "mesh-common/Cargo.toml",
    ];
    let mut names = manifests.map(String::from).to_vec();
    let mut folders = vec!["mesh-ebpf/src".to_owned(), "mesh-common/src".to_owned()];
    while let Some(folder) = folders.pop() {
        println!("cargo::rerun-if-changed={}", root.join(&folder).display());
        for entry in fs::read_dir(root.join(&folder))? {
            let entry = entry?;
            let name = format!("{folder}/{}", entry.file_name().to_string_lossy());
            if entry.file_type()?.is_dir() {
                folders.push(name);
            } else {
                names.push(name);
            }
        }
    }
    names.sort();
    Ok(names)
}
