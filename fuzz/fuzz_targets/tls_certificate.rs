//! A peer's certificate in DER.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tls::fuzzing::certificate(input));
