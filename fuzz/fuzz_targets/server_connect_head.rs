//! The head of an HTTP CONNECT request, and where it leads.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| proxy_server::fuzzing::connect_head(input));
