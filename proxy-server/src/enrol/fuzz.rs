//! The body of a fuzz target: what an agent sends to be enrolled.

use super::*;

/// Reads the first line of `input` as the Authorization header and the rest as the body. A token is taken as it was
/// written, and its secret does not reach a log.
pub fn enrolment(input: &[u8]) {
    let end = input.iter().position(|byte| *byte == b'\n').unwrap_or(input.len());
    let (line, body) = (&input[..end], input.get(end + 1..).unwrap_or_default());
    let mut request = Request::new(Body::empty());
    if let Ok(value) = http::HeaderValue::from_bytes(line) {
        request.headers_mut().insert(header::AUTHORIZATION, value);
    }
    if let Ok(Some(token)) = bearer_token(&request) {
        assert!(line.trim_ascii_end().ends_with(token.reveal().as_bytes()));
        assert!(token.matches(&token.hash()));
        let shown = format!("{token:?}");
        assert!(token.id.contains(&token.secret) || !shown.contains(&token.secret), "the secret is hidden");
    }
    if let Ok(body) = serde_json::from_slice::<CertificateRequest>(body)
        && let Some(Ok(agent)) = body.agent_id.as_deref().map(AgentId::from_str)
    {
        assert_eq!(Some(agent.as_str()), body.agent_id.as_deref());
    }
}
