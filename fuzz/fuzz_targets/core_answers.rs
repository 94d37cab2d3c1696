//! Lists and lines of watches as members' API servers answer them.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| federation_core::fuzzing::answers(input));
