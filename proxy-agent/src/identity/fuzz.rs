//! The body of a fuzz target: what the hub answers to a certificate request.

use std::sync::LazyLock;

use super::*;

/// Reads `input` as the answer: nothing but a certificate for our own key is taken.
pub fn enrolment_answer(input: &[u8]) {
    static KEY: LazyLock<AgentKey> =
        LazyLock::new(|| AgentKey::generate().expect("a key can be generated in a test"));

    if let Ok(issued) = serde_json::from_slice::<request::Issued>(input) {
        assert!(check(&issued, &KEY).is_err(), "nobody has signed this key");
    }
}
