//! A destination, `host:port`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tunnel::fuzzing::target(input));
