//! Answers that go on: watches and logs. Both end with the connection, the server, or by themselves.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::Body;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use http::{Response, StatusCode};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::negotiate::{Accept, Shape};
use super::response;
use crate::registry::resource::Resource;
use crate::registry::watch::{Watch, WatchEvent};
use crate::table;

/// A watch as a stream of JSON lines.
pub(super) fn watch(
    watch: Watch,
    resource: Arc<Resource>,
    accept: Accept,
    include: String,
) -> Response<Body> {
    // Column definitions are sent with the first table only, as kube-apiserver does.
    let state = (watch, resource, true);
    let lines = futures::stream::unfold(state, move |(mut watch, resource, mut first)| {
        let include = include.clone();
        async move {
            let event = watch.next().await?;
            let line = encode(&event, &resource, accept, &include, &mut first);
            Some((Ok::<Bytes, Infallible>(line), (watch, resource, first)))
        }
    });
    response::with_type(StatusCode::OK, Body::from_stream(lines), "application/json")
}

fn encode(event: &WatchEvent, resource: &Resource, accept: Accept, include: &str, first: &mut bool) -> Bytes {
    let object: Value = match event {
        WatchEvent::Error(error) => error.to_status(),
        WatchEvent::Bookmark(object) => match accept.shape {
            Shape::Table => {
                let with_columns = std::mem::take(first);
                table::of_objects(
                    resource,
                    std::slice::from_ref(object),
                    "Metadata",
                    with_columns,
                    Some(json!({})),
                )
            }
            Shape::Metadata => table::metadata_only(object),
            _ => object.clone(),
        },
        WatchEvent::Added(object) | WatchEvent::Modified(object) | WatchEvent::Deleted(object) => {
            match accept.shape {
                Shape::Table => {
                    let with_columns = std::mem::take(first);
                    table::of_objects(resource, std::slice::from_ref(object), include, with_columns, None)
                }
                Shape::Metadata => table::metadata_only(object),
                _ => object.clone(),
            }
        }
    };
    let mut line = json!({"type": event.kind(), "object": object}).to_string();
    line.push('\n');
    Bytes::from(line)
}

/// A log as a stream of text.
pub(super) fn log(lines: BoxStream<'static, Bytes>, shutdown: CancellationToken) -> Response<Body> {
    let body = Body::from_stream(lines.take_until(shutdown.cancelled_owned()).map(Ok::<Bytes, Infallible>));
    response::with_type(StatusCode::OK, body, "text/plain")
}
