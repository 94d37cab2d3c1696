//! Defaults, pruning, validation and field ownership of an object.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| federation_apiserver::fuzzing::object(input));
