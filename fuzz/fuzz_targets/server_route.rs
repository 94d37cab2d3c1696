//! Authority, cluster header and proxy user of a request.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| proxy_server::fuzzing::route(input));
