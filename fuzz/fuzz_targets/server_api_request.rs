//! Path and headers of a request to a member's API.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| proxy_server::fuzzing::api_request(input));
