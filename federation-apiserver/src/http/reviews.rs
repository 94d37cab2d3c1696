//! Requests for reviews: virtual resources that are created and answered at once.

use std::sync::Arc;

use axum::body::Body;
use http::{Method, Response, StatusCode};
use serde_json::{Value, json};

use super::path::ResourcePath;
use super::resources::{object_body, write_options};
use super::{App, Call, negotiate, response};
use crate::auth::service_accounts::strings;
use crate::registry::reviews::{self, Review};
use crate::status::ApiError;
use crate::value::str_at;

/// Answers a request in one of the groups of reviews.
pub(super) async fn handle(
    app: &Arc<App>,
    path: &ResourcePath,
    call: Call,
) -> Result<Response<Body>, ApiError> {
    let review =
        reviews::find(&path.group, &path.version, &path.plural).ok_or_else(ApiError::no_such_path)?;
    if review.namespaced == path.namespace.is_empty() {
        return Err(ApiError::no_such_path());
    }
    if !path.name.is_empty() {
        return Err(ApiError::no_such_path());
    }
    if call.method != Method::POST {
        return Err(ApiError::method_unknown());
    }
    let accept = negotiate::accept(call.request.headers())?;
    let user = call.user.clone();
    let options = write_options(&call, "")?;
    let mut body = object_body(app, call, review.kind).await?.value;
    let kind = str_at(&body, &["kind"]);
    if !kind.is_empty() && kind != review.kind {
        return Err(ApiError::bad_request(format!("{kind} cannot be handled as a {}", review.kind)));
    }
    if body.is_object() {
        app.registry.admit_review(review, &path.namespace, &options, &mut body).await?;
    }
    let answer = match review.kind {
        "TokenReview" => token(app, review, &body).await?,
        _ => reviews::answer(review, &path.namespace, &user, &app.registry.rbac, &body)?,
    };
    Ok(response::value(StatusCode::CREATED, &answer, accept.encoding))
}

async fn token(app: &App, review: Review, body: &Value) -> Result<Value, ApiError> {
    let token = str_at(body, &["spec", "token"]);
    if token.is_empty() {
        return Err(ApiError::bad_request("token is required for TokenReview in authentication"));
    }
    let mut answer = reviews::frame(review);
    answer["spec"] = body.get("spec").cloned().unwrap_or_default();
    let audiences = strings(crate::value::at(body, &["spec", "audiences"]));
    answer["status"] = match app.authenticator.token(token, &audiences).await {
        Ok(found) => {
            json!({"authenticated": true, "user": reviews::user_info(&found.user), "audiences": found.audiences})
        }
        Err(why) => json!({"user": {}, "error": why}),
    };
    Ok(answer)
}
