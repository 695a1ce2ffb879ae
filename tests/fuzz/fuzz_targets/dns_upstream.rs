//! Explores `dns_upstream` of targets.rs.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| mesh_fuzz::dns_upstream(data));
