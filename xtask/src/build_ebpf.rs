//! The eBPF object: built from source, never committed.
//!
//! An object without BTF is refused, and one is left beside the hash of its sources: whoever embeds it can
//! tell that it is of them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Parser;
use sha2::{Digest, Sha256};

use crate::bpf_toolchain::{TARGET, Toolchain};
use crate::{setup, shell};

#[derive(Debug, Parser)]
pub(crate) struct Options {}

impl Options {
    pub(crate) fn run(self) -> Result<()> {
        let object = build()?;
        println!("{}", object.display());
        Ok(())
    }
}

/// Builds the object and leaves it, with the hash of its sources, where mesh-agent's build script
/// looks for it.
pub(crate) fn build() -> Result<PathBuf> {
    setup::prepare(setup::Purpose::BuildEbpf)?;
    let toolchain = Toolchain::find().context("find a Rust toolchain for BPF")?;
    let root = shell::root();
    // Wherever cargo's own target folder is: mesh-agent's build script looks here.
    let folder = root.join("target/ebpf");
    let sources = hash_of_sources(root)?;
    let bytes = compile("mesh-ebpf", root, &folder, toolchain)?;
    let object = folder.join("mesh-ebpf.o");
    place(&object, &bytes)?;
    place(&folder.join("mesh-ebpf.o.sha256"), sources.as_bytes())?;
    Ok(object)
}

/// Builds the object that only the benchmark loads.
pub(crate) fn build_bench() -> Result<PathBuf> {
    let toolchain = Toolchain::find().context("find a Rust toolchain for BPF")?;
    let root = shell::root();
    let folder = root.join("target/ebpf");
    let bytes = compile("mesh-ebpf-bench", root, &folder, toolchain)?;
    let object = folder.join("mesh-ebpf-bench.o");
    place(&object, &bytes)?;
    Ok(object)
}

/// The object of a changed copy of the sources below `root`; `None` if it does not compile.
pub(crate) fn try_compile(root: &Path) -> Result<Option<Vec<u8>>> {
    let toolchain = Toolchain::find().context("find a Rust toolchain for BPF")?;
    let folder = root.join("target");
    let mut cargo = command("mesh-ebpf", root, &folder, toolchain);
    cargo.arg("--quiet").stderr(std::process::Stdio::null());
    if !cargo.status().context("start cargo")?.success() {
        return Ok(None);
    }
    let built = folder.join(TARGET).join("release/mesh-ebpf");
    Ok(Some(
        std::fs::read(&built).with_context(|| format!("read {}", built.display()))?,
    ))
}

/// One object of the package `mesh-ebpf` below `root`, with the target folder `folder`.
fn compile(name: &str, root: &Path, folder: &Path, toolchain: Toolchain) -> Result<Vec<u8>> {
    shell::run(&mut command(name, root, folder, toolchain))?;
    let built = folder.join(TARGET).join("release").join(name);
    let bytes = std::fs::read(&built).with_context(|| format!("read {}", built.display()))?;
    let sections = section_names(&bytes).context("the linker's output is no 64-bit ELF object")?;
    for wanted in [".BTF", ".BTF.ext", "license"] {
        if !sections.iter().any(|name| name == wanted) {
            bail!(
                "the object has no section {wanted}: it was linked without `--btf`, or flags were inherited"
            );
        }
    }
    Ok(bytes)
}

fn command(name: &str, root: &Path, folder: &Path, toolchain: Toolchain) -> Command {
    let mut cargo = toolchain.cargo();
    cargo
        .args(["--release", "--locked", "--bin", name, "--manifest-path"])
        .arg(root.join("mesh-ebpf/Cargo.toml"))
        .args(["--target", TARGET, "--target-dir"])
        .arg(folder);
    cargo
}

/// Leaves a file that stands already as it is, so that nothing that depends on it is built anew.
fn place(path: &Path, bytes: &[u8]) -> Result<()> {
    if std::fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    std::fs::write(path, bytes).with_context(|| format!("write {}", path.display()))
}

/// SHA-256 over all sources of the object, sorted by path: the path relative to the checkout,
/// NUL, the bytes. mesh-agent's build script computes the same.
fn hash_of_sources(root: &Path) -> Result<String> {
    let mut files = vec![
        "mesh-ebpf/Cargo.toml".to_owned(),
        "mesh-ebpf/Cargo.lock".to_owned(),
        "mesh-common/Cargo.toml".to_owned(),
    ];
    for folder in ["mesh-ebpf/src", "mesh-common/src"] {
        files_below(root, folder, &mut files)?;
    }
    files.sort();
    let mut hash = Sha256::new();
    for file in &files {
        hash.update(file.as_bytes());
        hash.update([0]);
        hash.update(std::fs::read(root.join(file)).with_context(|| format!("read {file}"))?);
    }
    Ok(hex::encode(hash.finalize()))
}

fn files_below(root: &Path, folder: &str, files: &mut Vec<String>) -> Result<()> {
    let entries = std::fs::read_dir(root.join(folder)).with_context(|| format!("list {folder}"))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("list {folder}"))?;
        let path = format!("{folder}/{}", entry.file_name().to_string_lossy());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files_below(root, &path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// Whether two objects differ in nothing but what is said for debuggers.
pub(crate) fn is_same_code(one: &[u8], other: &[u8]) -> Result<bool> {
    let code = |object| {
        let sections = sections(object).context("no 64-bit ELF object")?;
        let mut code = sections;
        code.retain(|(name, _)| !name.contains(".BTF") && !name.contains(".debug"));
        anyhow::Ok(code)
    };
    Ok(code(one)? == code(other)?)
}

fn section_names(elf: &[u8]) -> Option<Vec<String>> {
    Some(sections(elf)?.into_iter().map(|(name, _)| name).collect())
}

/// Names and contents of the sections of a little-endian 64-bit ELF file (System V ABI, chapter 4).
fn sections(elf: &[u8]) -> Option<Vec<(String, &[u8])>> {
    if elf.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let table = usize::try_from(number(elf, 0x28, 8)?).ok()?;
    let entry_size = usize::try_from(number(elf, 0x3a, 2)?).ok()?;
    let count = usize::try_from(number(elf, 0x3c, 2)?).ok()?;
    let names = usize::try_from(number(elf, 0x3e, 2)?).ok()?;
    let header = |index: usize| table.checked_add(index.checked_mul(entry_size)?);
    let strings = usize::try_from(number(elf, header(names)?.checked_add(0x18)?, 8)?).ok()?;
    (0..count)
        .map(|index| {
            let offset = usize::try_from(number(elf, header(index)?, 4)?).ok()?;
            let name = elf.get(strings.checked_add(offset)?..)?;
            let end = name.iter().position(|byte| *byte == 0)?;
            let name = String::from_utf8_lossy(&name[..end]).into_owned();
            let content =
                usize::try_from(number(elf, header(index)?.checked_add(0x18)?, 8)?).ok()?;
            let size = usize::try_from(number(elf, header(index)?.checked_add(0x20)?, 8)?).ok()?;
            // Of SHT_NOBITS nothing is in the file.
            let has_content = number(elf, header(index)?.checked_add(4)?, 4)? != 8;
            let size = if has_content { size } else { 0 };
            Some((name, elf.get(content..content.checked_add(size)?)?))
        })
        .collect()
}

fn number(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(length)?)?;
    Some(
        bytes
            .iter()
            .rev()
            .fold(0, |sum, byte| sum << 8 | u64::from(*byte)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sections_of_an_object_are_found_by_name() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let sections = section_names(&own).unwrap();
        assert!(sections.iter().any(|name| name == ".text"), "{sections:?}");
    }

    #[test]
    fn what_is_no_elf_file_has_no_sections() {
        assert_eq!(section_names(b""), None);
        assert_eq!(section_names(b"\x7fELF\x02\x01 and then nothing"), None);
    }

    #[test]
    fn the_hash_changes_with_a_byte_and_with_a_name() {
        let folder = std::env::temp_dir().join(format!("xtask-hash-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = folder.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        for file in [
            "mesh-ebpf/Cargo.toml",
            "mesh-ebpf/Cargo.lock",
            "mesh-common/Cargo.toml",
        ] {
            write(file, "");
        }
        write("mesh-ebpf/src/main.rs", "a");
        write("mesh-common/src/lib.rs", "b");
        let first = hash_of_sources(&folder).unwrap();
        write("mesh-common/src/lib.rs", "c");
        let second = hash_of_sources(&folder).unwrap();
        write("mesh-common/src/sub/x.rs", "");
        let third = hash_of_sources(&folder).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(first != second && second != third && first != third);
    }
}
