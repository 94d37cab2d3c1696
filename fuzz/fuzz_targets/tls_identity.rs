//! The SPIFFE URI and the names in it.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tls::fuzzing::identity(input));
