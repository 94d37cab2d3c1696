//! Accept, Authorization and impersonation headers.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| federation_apiserver::fuzzing::headers(input));
