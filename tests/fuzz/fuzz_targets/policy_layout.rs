//! Explores `policy_layout` of targets.rs.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| mesh_fuzz::policy_layout(data));
