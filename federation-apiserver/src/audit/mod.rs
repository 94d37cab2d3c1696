//! The audit log: who did what, when, and how it ended, as `audit.k8s.io/v1` events. Source: Kubernetes, "Auditing".

pub mod log;
pub mod policy;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use http::HeaderMap;
use serde_json::{Value, json};

pub use log::{AuditLogConfig, AuditSink, LogError};
pub use policy::{Level, Policy, PolicyError, Stage, Verdict};

use crate::admission::Annotation;
use crate::auth::UserInfo;
use crate::followed::Followed;
use crate::rbac::Attributes;
use crate::registry::reviews;
use crate::value;

/// Longest user agent that is told; the rest says nothing.
const MAX_AGENT: usize = 1024;

/// Policy and log.
#[derive(Clone, Debug)]
pub(crate) struct Audit {
    pub(crate) policy: Arc<Followed<Policy>>,
    pub(crate) sink: AuditSink,
}

/// The outside of a request.
pub(crate) struct About<'a> {
    pub(crate) id: &'a str,
    pub(crate) uri: &'a str,
    pub(crate) headers: &'a HeaderMap,
    pub(crate) client: Option<std::net::IpAddr>,
}

/// The event of one request, as far as it is known.
#[derive(Debug)]
pub(crate) struct Trail {
    sink: AuditSink,
    verdict: Verdict,
    event: Value,
}

fn time(at: jiff::Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string()
}

// === impl Audit ===

impl Audit {
    /// Begins the trail of a request, `None` when the policy wants none.
    pub(crate) fn begin(
        &self,
        user: &UserInfo,
        attributes: &Attributes,
        about: &About<'_>,
        received: jiff::Timestamp,
    ) -> Option<Trail> {
        let verdict = self.policy.current().verdict(user, attributes);
        if verdict.level == Level::None {
            return None;
        }
        let agent =
            about.headers.get(http::header::USER_AGENT).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let mut event = json!({
            "kind": "Event", "apiVersion": "audit.k8s.io/v1", "level": format!("{:?}", verdict.level),
            "auditID": about.id, "requestURI": about.uri, "verb": attributes.verb, "user": reviews::user_info(user),
            "userAgent": agent.chars().take(MAX_AGENT).collect::<String>(),
            "requestReceivedTimestamp": time(received), "annotations": {},
        });
        if let Some(client) = about.client {
            event["sourceIPs"] = json!([client.to_string()]);
        }
        if let Some(r) = &attributes.resource {
            let mut object = serde_json::Map::new();
            for (key, text) in [
                ("resource", &r.resource),
                ("namespace", &r.namespace),
                ("name", &r.name),
                ("apiGroup", &r.group),
                ("apiVersion", &r.version),
                ("subresource", &r.subresource),
            ] {
                if !text.is_empty() {
                    object.insert(key.into(), json!(text));
                }
            }
            event["objectRef"] = Value::Object(object);
        }
        Some(Trail { sink: self.sink.clone(), verdict, event })
    }
}

// === impl Trail ===

impl Trail {
    pub(crate) fn level(&self) -> Level {
        self.verdict.level
    }

    /// Whom the request acts as.
    pub(crate) fn impersonated(&mut self, user: &UserInfo) {
        self.event["impersonatedUser"] = reviews::user_info(user);
    }

    /// What the authorizer said.
    pub(crate) fn decided(&mut self, allowed: bool, reason: &str) {
        let decision = if allowed { "allow" } else { "forbid" };
        self.event["annotations"]["authorization.k8s.io/decision"] = json!(decision);
        self.event["annotations"]["authorization.k8s.io/reason"] = json!(reason);
    }

    /// What admission has noted; content of the request from level Request on only.
    pub(crate) fn annotate(&mut self, annotations: BTreeMap<String, Annotation>) {
        for (key, annotation) in annotations {
            if !annotation.content || self.verdict.level >= Level::Request {
                self.event["annotations"][key] = json!(annotation.value);
            }
        }
    }

    /// The request's body, told from level Request on.
    pub(crate) fn request(&mut self, object: Value) {
        if self.verdict.level >= Level::Request {
            self.event["requestObject"] = self.trimmed(object);
        }
    }

    /// The answer's code and, for an error, what its `Status` says; at level RequestResponse the whole body.
    pub(crate) fn response(&mut self, code: u16, body: &[u8]) {
        self.event["responseStatus"] = json!({"metadata": {}, "code": code});
        let object = serde_json::from_slice::<Value>(body).ok();
        if code >= 400 {
            for key in ["status", "message", "reason"] {
                if let Some(text) = object.as_ref().and_then(|o| o.get(key)).filter(|v| v.is_string()) {
                    self.event["responseStatus"][key] = text.clone();
                }
            }
        }
        if let Some(object) = object.filter(|_| self.verdict.level >= Level::RequestResponse) {
            self.event["responseObject"] = self.trimmed(object);
        }
    }

    /// The answer's body is larger than what is told of it. Said as kube-apiserver says it of an event that it truncates.
    pub(crate) fn cut_short(&mut self) {
        self.event["annotations"]["audit.k8s.io/truncated"] = json!("true");
    }

    fn trimmed(&self, mut object: Value) -> Value {
        if self.verdict.omit_managed_fields {
            value::remove(&mut object, &["metadata", "managedFields"]);
            for item in object.get_mut("items").and_then(Value::as_array_mut).into_iter().flatten() {
                value::remove(item, &["metadata", "managedFields"]);
            }
        }
        object
    }

    /// Writes the event of a stage.
    pub(crate) async fn stage(&mut self, stage: Stage, now: jiff::Timestamp) {
        if let Some(line) = self.line(stage, now) {
            self.sink.write(line).await;
        }
    }

    /// Writes the last event from a place that cannot wait (the end of a stream).
    pub(crate) fn end(&mut self, now: jiff::Timestamp) {
        if let Some(line) = self.line(Stage::ResponseComplete, now)
            && !self.sink.try_write(line)
        {
            tracing::error!("an audit event was lost: the log does not keep up");
        }
    }

    fn line(&mut self, stage: Stage, now: jiff::Timestamp) -> Option<Bytes> {
        if self.verdict.omit_stages.contains(&stage) {
            return None;
        }
        self.event["stage"] = json!(format!("{stage:?}"));
        self.event["stageTimestamp"] = json!(time(now));
        Some(Bytes::from(self.event.to_string()))
    }
}
