//! Explores `policy_diff` of targets.rs.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| mesh_fuzz::policy_diff(data));
