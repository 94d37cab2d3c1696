//! Continue tokens of lists.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| federation_apiserver::fuzzing::continue_token(input));
