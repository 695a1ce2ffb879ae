//! What the verifier has to read, held against what is recorded.
//!
//! `instructions.json` has a record for each kernel and compiler. What another compiler makes is held
//! against the last record of the same kernel: a new compiler is no licence to grow. Verifiers of two
//! kernels count differently, so on a kernel without any record nothing can be compared, which CI does
//! not take for a success.

use std::path::Path;

use serde_json::{Value, json};

use crate::kernel::Kernel;

const PROGRAMS: [&str; 10] = [
    "mesh_in",
    "mesh_eg",
    "mesh_in_l2",
    "mesh_eg_l2",
    "guard",
    "why_in",
    "why_eg",
    "ticks",
    "revoke",
    "identify",
];

/// Compiled in: a virtual machine has no checkout.
const RECORDED: &str = include_str!("instructions.json");

/// Old kernels give up at a million, and find more than new ones.
const LIMIT: u32 = 200_000;

fn verified(kernel: &mut Kernel, name: &'static str) -> u32 {
    let program = kernel.load_program(name);
    let info = program.info().unwrap();
    println!(
        "{name}: {} instructions verified, {} bytes of machine code",
        info.verified_instruction_count().unwrap(),
        info.size_jitted(),
    );
    info.verified_instruction_count().expect("since Linux 5.16")
}

#[test]
fn every_program_loads() {
    let mut kernel = Kernel::new();
    for name in PROGRAMS {
        kernel.load_program(name);
    }
}

#[test]
fn no_program_grows_by_a_tenth_unnoticed() {
    let mut kernel = Kernel::new();
    let counts: Vec<(&str, u32)> = PROGRAMS
        .iter()
        .map(|name| (*name, verified(&mut kernel, name)))
        .collect();
    for (name, count) in &counts {
        assert!(
            *count < LIMIT,
            "{name} is near the limit of old kernels: {count}"
        );
    }
    let records: Vec<Value> = serde_json::from_str(RECORDED).unwrap();
    let now = json!({
        "kernel": kernel_series(),
        "compiler": compiler(),
        "verified": counts.iter().copied().collect::<std::collections::BTreeMap<_, _>>(),
    });
    if std::env::var_os("MESH_RECORD").is_some() {
        return keep(&records, now);
    }
    let Some(record) = closest(&records, &now) else {
        assert!(
            std::env::var_os("CI").is_none(),
            "no record of this kernel: MESH_RECORD=1, or add {now}"
        );
        println!("no record of this kernel, nothing was compared: MESH_RECORD=1, or add {now}");
        return;
    };
    let by = &record["compiler"];
    if *by != now["compiler"] {
        println!("compared with what compiler {by} made: MESH_RECORD=1, or add {now}");
    }
    for (name, count) in counts {
        let before = record["verified"][name].as_u64().unwrap_or_default();
        assert!(
            u64::from(count) * 10 <= before * 11,
            "{name} has grown from {before} (compiler {by}) to {count} instructions: if it must, \
             MESH_RECORD=1, or add {now}"
        );
    }
}

/// The record of this kernel and compiler, or the last of the kernel.
fn closest<'a>(records: &'a [Value], now: &Value) -> Option<&'a Value> {
    let of_kernel = || {
        let records = records.iter().rev();
        records.filter(|record| record["kernel"] == now["kernel"])
    };
    let mut exact = of_kernel().filter(|record| record["compiler"] == now["compiler"]);
    exact.next().or_else(|| of_kernel().next())
}

/// Writes the record where there is a checkout, and prints it in any case.
fn keep(records: &[Value], now: Value) {
    println!("{now}");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("ebpf/instructions.json");
    if !path.exists() {
        return;
    }
    let is_other = |record: &&Value| {
        record["kernel"] != now["kernel"] || record["compiler"] != now["compiler"]
    };
    let mut kept: Vec<_> = records.iter().filter(is_other).cloned().collect();
    kept.push(now);
    let text = serde_json::to_string_pretty(&kept).unwrap() + "\n";
    std::fs::write(path, text).unwrap();
}

#[test]
fn a_record_of_another_compiler_serves_but_not_one_of_another_kernel() {
    let record = |kernel, compiler| json!({ "kernel": kernel, "compiler": compiler });
    let records = [
        record("6.12", "1.95"),
        record("6.12", "1.96"),
        record("6.18", "1.97"),
    ];
    for (kernel, compiler, expected) in [
        ("6.12", "1.95", Some(0)),
        ("6.12", "1.96", Some(1)),
        ("6.12", "1.97", Some(1)),
        ("6.18", "1.95", Some(2)),
        ("6.1", "1.95", None),
    ] {
        let found = closest(&records, &record(kernel, compiler));
        let expected = expected.map(|index: usize| &records[index]);
        assert_eq!(found, expected, "{kernel} {compiler}");
    }
}

/// Of the kernel's version, what decides over its verifier.
fn kernel_series() -> String {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    release.split('.').take(2).collect::<Vec<_>>().join(".")
}

/// As the object itself says: a note of the compiler in its section `.comment` or debug information.
fn compiler() -> String {
    let object = std::env::var_os("MESH_EBPF_OBJECT").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/ebpf/mesh-ebpf.o"),
        std::path::PathBuf::from,
    );
    let bytes = std::fs::read(object).unwrap();
    let start = b"rustc version ";
    let at = bytes
        .windows(start.len())
        .position(|window| window == start);
    let rest = at.map_or(&b""[..], |at| &bytes[at + start.len()..]);
    let end = rest.iter().position(|byte| !byte.is_ascii_graphic());
    String::from_utf8_lossy(&rest[..end.unwrap_or(0)]).into_owned()
}
