//! The answer of an egress proxy to CONNECT, before a tunnel.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tunnel::fuzzing::egress_answer(input));
