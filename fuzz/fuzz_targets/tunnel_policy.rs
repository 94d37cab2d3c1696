//! Destination rules, as the hub reads them from annotations.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tunnel::fuzzing::policy(input));
