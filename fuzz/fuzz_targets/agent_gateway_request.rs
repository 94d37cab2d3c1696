//! Headers of a request to the agent's API gateway.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| proxy_agent::fuzzing::gateway_request(input));
