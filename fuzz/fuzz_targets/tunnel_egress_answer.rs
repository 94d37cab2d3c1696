//! The answer to CONNECT: of an egress proxy before a tunnel, and of the hub to `cellway dial`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tunnel::fuzzing::egress_answer(input));
