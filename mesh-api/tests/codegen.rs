//! The committed code is what the .proto files say.
//!
//! The compiler is pure Rust (protox), so this runs everywhere; `UPDATE=1 cargo test -p mesh-api
//! --test codegen` (or `cargo xtask codegen`) writes the file instead of comparing it.

use std::path::{Path, PathBuf};

const PROTOS: [&str; 4] = [
    "mesh/v1/types.proto",
    "mesh/v1/control.proto",
    "mesh/v1/admin.proto",
    "mesh/v1/local.proto",
];

fn generate(out: &Path) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let descriptors = protox::compile(PROTOS, [root]).expect("the .proto files compile");
    tonic_prost_build::configure()
        .out_dir(out)
        .emit_rerun_if_changed(false)
        .compile_fds(descriptors)
        .expect("code generation");
}

#[test]
fn committed_code_matches_the_protos() {
    let committed: PathBuf = [env!("CARGO_MANIFEST_DIR"), "src", "gen", "mesh.v1.rs"]
        .iter()
        .collect();
    let out = tempfile::tempdir().unwrap();
    generate(out.path());
    let fresh = std::fs::read_to_string(out.path().join("mesh.v1.rs")).unwrap();
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&committed, &fresh).unwrap();
    }
    let old = std::fs::read_to_string(&committed).unwrap_or_default();
    assert!(
        old == fresh,
        "src/gen is older than proto/: run `cargo xtask codegen`"
    );
}
