//! A kubeconfig in a Secret, for a member.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| federation_core::fuzzing::credentials(input));
