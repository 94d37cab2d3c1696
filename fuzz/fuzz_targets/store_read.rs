//! Etcd's reads.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| federation_store::fuzzing::read(input));
