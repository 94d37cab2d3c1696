//! The answer of an egress proxy to CONNECT.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| proxy_agent::fuzzing::egress_answer(input));
