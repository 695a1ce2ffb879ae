//! Explores `coordinator_config` of targets.rs.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| mesh_fuzz::coordinator_config(data));
