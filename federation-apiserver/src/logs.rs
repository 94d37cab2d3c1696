//! The door through which the `pods/log` subresource gets its lines.

use bytes::Bytes;
use futures::stream::BoxStream;
use serde_json::Value;

use crate::status::ApiError;

/// What a client asked for, as in `PodLogOptions`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Which container; may be left out when there is one.
    pub container: Option<String>,
    /// Go on with new lines until the client leaves.
    pub follow: bool,
    pub tail_lines: Option<u64>,
    pub since_seconds: Option<u64>,
    /// Put the time before each line.
    pub timestamps: bool,
    /// Of the container's former instance.
    pub previous: bool,
    pub limit_bytes: Option<u64>,
}

/// Something that has the logs of pods.
pub trait LogSource: Send + Sync {
    /// Opens the log of a container of `pod`. The stream ends when the log does, or never when following.
    fn open(&self, pod: &Value, options: LogOptions) -> Result<BoxStream<'static, Bytes>, ApiError>;
}
