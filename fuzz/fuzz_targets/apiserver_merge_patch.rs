//! Merge patches and strategic merge patches.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| federation_apiserver::fuzzing::merge_patch(input));
