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
use crate::registry::read::Entries;
use crate::registry::resource::Resource;
use crate::registry::watch::{Watch, WatchEvent};
use crate::status::ApiError;
use crate::table;

/// A watch as a stream of JSON lines.
pub(super) fn watch(watch: Watch, accept: Accept, include: String) -> Response<Body> {
    if accept.shape == Shape::Plain {
        let pieces = futures::stream::unfold(watch.into_lines(), |mut lines| async move {
            let text = lines.next().await?;
            Some((Ok::<Bytes, Infallible>(text), lines))
        });
        return response::with_type(StatusCode::OK, Body::from_stream(pieces), "application/json");
    }
    let resource = watch.resource().clone();
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

/// Items encoded at once: lists of any length take this much memory beyond the objects, which are shared.
const PIECE: usize = 256 * 1024;

/// A list as it is in memory, written out piece by piece as fast as the client reads.
pub(super) fn list(page: Entries, resource: Arc<Resource>, meta: &Value) -> Response<Body> {
    // Items of typed lists carry no type of their own.
    let typed = resource.is_custom();
    let head = json!({"kind": resource.list_kind, "apiVersion": resource.api_version(), "metadata": meta})
        .to_string();
    let mut text = Vec::with_capacity(PIECE.min(page.items.iter().map(|e| e.weight()).sum::<usize>() + 256));
    // Its closing brace comes at the end.
    text.extend_from_slice(&head.as_bytes()[..head.len() - 1]);
    text.extend_from_slice(b",\"items\":[");
    let mut items = page.items.into_iter();
    let mut first = true;
    let mut state = Some(text);
    let mut piece = move || -> Option<Result<Bytes, ApiError>> {
        let mut text = state.take()?;
        for entry in items.by_ref() {
            if !std::mem::take(&mut first) {
                text.push(b',');
            }
            if let Err(error) = entry.encode(&resource, entry.kv.mod_revision, typed, &mut text) {
                return Some(Err(error));
            }
            if text.len() >= PIECE {
                state = Some(Vec::with_capacity(PIECE + PIECE / 4));
                return Some(Ok(text.into()));
            }
        }
        text.extend_from_slice(b"]}");
        Some(Ok(text.into()))
    };
    // The first piece is made here: most lists are one piece, and one that cannot be encoded gets a proper answer.
    let whole = match piece() {
        Some(Ok(text)) => text,
        Some(Err(error)) => return response::error(&error),
        None => Bytes::new(),
    };
    match piece() {
        None => response::with_type(StatusCode::OK, whole, "application/json"),
        Some(second) => {
            let pieces = [Ok(whole), second].into_iter().chain(std::iter::from_fn(piece));
            let body = Body::from_stream(futures::stream::iter(pieces));
            response::with_type(StatusCode::OK, body, "application/json")
        }
    }
}

/// A log as a stream of text.
pub(super) fn log(lines: BoxStream<'static, Bytes>, shutdown: CancellationToken) -> Response<Body> {
    let body = Body::from_stream(lines.take_until(shutdown.cancelled_owned()).map(Ok::<Bytes, Infallible>));
    response::with_type(StatusCode::OK, body, "text/plain")
}
