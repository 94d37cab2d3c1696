//! The conversion webhook, for a stock kube-apiserver as hub: KubeFed's form of federated objects and the stored one.
//!
//! It asks nobody who they are: it is a function of what it is sent, and knows nothing.

use axum::extract::DefaultBodyLimit;
use axum::routing::post;
use axum::{Json, Router};
use federation_core::conversion;
use serde_json::Value;

/// Largest review: a page of five hundred objects of 32 KiB.
const MAX_REVIEW: usize = 16 << 20;

/// The router, with whole paths.
pub(super) fn router() -> Router {
    Router::new()
        .route(
            "/cellway/v1/convert",
            post(async |Json(review): Json<Value>| Json(conversion::review(&review))),
        )
        .layer(DefaultBodyLimit::max(MAX_REVIEW))
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use axum::http::{Request, StatusCode, header};
    use serde_json::json;
    use tower::ServiceExt as _;

    use super::*;

    async fn ask(body: String) -> (StatusCode, Value) {
        let request = Request::post("/cellway/v1/convert")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Body::from(body))
            .expect("request");
        let response = router().oneshot(request).await.expect("response");
        let status = response.status();
        let body = to_bytes(response.into_body(), MAX_REVIEW).await.expect("body");
        (status, serde_json::from_slice(&body).unwrap_or_default())
    }

    #[tokio::test]
    async fn reviews_are_answered() {
        let object = json!({"apiVersion": "types.kubefed.io/v1beta1", "kind": "FederatedConfigMap",
            "metadata": {"name": "a"}, "spec": {"placement": {"clusters": [{"name": "x"}]}}});
        let review = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "ConversionReview", "request": {
            "uid": "u", "desiredAPIVersion": "types.kubefed.io/v1beta2", "objects": [object]}});
        let (status, answer) = ask(review.to_string()).await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(answer["response"]["result"]["status"], "Success");
        let units = &answer["response"]["convertedObjects"][0]["spec"]["placement"]["units"];
        assert_eq!(*units, json!([{"name": "x"}]));
        assert!(ask("no json".into()).await.0.is_client_error());
    }
}
