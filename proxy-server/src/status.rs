//! Errors as Kubernetes says them: a `Status` object in JSON.

use axum::body::Body;
use http::{HeaderValue, Response, StatusCode, header};
use serde_json::json;

use crate::error::{ERROR_HEADER, ProxyError};

/// A failure `Status` as a response.
pub fn response(status: StatusCode, reason: &str, message: &str) -> Response<Body> {
    let body = json!({
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": status.as_u16(),
    });
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A [`ProxyError`] as a response: the five cases keep their codes in the `cellway-error` header.
pub fn of_error(error: &ProxyError) -> Response<Body> {
    let reason = match error.status() {
        StatusCode::NOT_FOUND => "NotFound",
        StatusCode::FORBIDDEN => "Forbidden",
        StatusCode::GATEWAY_TIMEOUT => "Timeout",
        StatusCode::TOO_MANY_REQUESTS => "TooManyRequests",
        StatusCode::SERVICE_UNAVAILABLE => "ServiceUnavailable",
        StatusCode::BAD_REQUEST => "BadRequest",
        // Kubernetes has no word for a bad gateway; clients act on the code.
        _ => "InternalError",
    };
    let mut response = response(error.status(), reason, &format!("{error}: {}", error.advice()));
    response.headers_mut().insert(ERROR_HEADER, HeaderValue::from_static(error.code()));
    response
}
