//! The hub's answer to a certificate request.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| proxy_agent::fuzzing::enrolment_answer(input));
