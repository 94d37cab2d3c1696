//! Answers: JSON or YAML bodies, `Status` objects, warning headers.

use axum::body::Body;
use http::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER, WARNING, WWW_AUTHENTICATE};
use http::{Response, StatusCode};
use serde_json::Value;

use super::negotiate::Encoding;
use crate::status::ApiError;

/// Warnings that one answer carries, and the length of each: headers are bounded at both ends.
const MAX_WARNINGS: usize = 16;
const MAX_WARNING: usize = 1024;

/// An answer with a JSON value.
pub(crate) fn value(code: StatusCode, value: &Value, encoding: Encoding) -> Response<Body> {
    let (body, media) = match encoding {
        Encoding::Json => (value.to_string(), "application/json"),
        Encoding::Yaml => (serde_yaml_ng::to_string(value).unwrap_or_default(), "application/yaml"),
    };
    with_type(code, body, media)
}

/// An answer with a `Status` for an error.
pub(crate) fn error(error: &ApiError) -> Response<Body> {
    let code = StatusCode::from_u16(error.code()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    if error.is_page() {
        return text(code, "404 page not found\n");
    }
    let mut response = value(code, &error.to_status(), Encoding::Json);
    if code == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"cellway\""));
    }
    if matches!(error.code(), 429 | 503) {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

/// An answer with text.
pub(crate) fn text(code: StatusCode, body: impl Into<Body>) -> Response<Body> {
    with_type(code, body, "text/plain; charset=utf-8")
}

/// An answer with a body of some media type.
pub(crate) fn with_type(code: StatusCode, body: impl Into<Body>, media: &'static str) -> Response<Body> {
    let mut response = Response::new(body.into());
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media));
    response
}

/// Adds `Warning: 299 - "…"` headers.
pub(crate) fn warn(response: &mut Response<Body>, warnings: &[String]) {
    for text in warnings.iter().take(MAX_WARNINGS) {
        let mut quoted = String::with_capacity(text.len() + 10);
        for c in text.chars().take(MAX_WARNING).filter(|c| c.is_ascii() && !c.is_ascii_control()) {
            if c == '"' || c == '\\' {
                quoted.push('\\');
            }
            quoted.push(c);
        }
        if let Ok(header) = HeaderValue::try_from(format!("299 - \"{quoted}\"")) {
            response.headers_mut().append(WARNING, header);
        }
    }
}
