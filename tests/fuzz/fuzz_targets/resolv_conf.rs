//! Explores `resolv_conf` of targets.rs.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| mesh_fuzz::resolv_conf(data));
