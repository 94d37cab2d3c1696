//! URLs to listen on.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| federation_store::fuzzing::listen_url(input));
