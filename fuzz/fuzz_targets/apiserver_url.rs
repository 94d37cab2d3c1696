//! Path and query of a request.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| federation_apiserver::fuzzing::url(input));
