//! Overrides of a federated object, over its template.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| federation_core::fuzzing::patches(input));
