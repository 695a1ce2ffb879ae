//! Explores `netmap_update` of targets.rs.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| mesh_fuzz::netmap_update(data));
