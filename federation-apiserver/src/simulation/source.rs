//! The simulated logs as the API server's `pods/log` asks for them.

use bytes::Bytes;
use futures::stream::BoxStream;
use serde_json::Value;

use super::logs::{LineOptions, SimulatedLogs};
use crate::logs::{LogOptions, LogSource};
use crate::status::ApiError;

impl LogSource for SimulatedLogs {
    fn open(&self, pod: &Value, options: LogOptions) -> Result<BoxStream<'static, Bytes>, ApiError> {
        let LogOptions { container, follow, tail_lines, since_seconds, timestamps, previous, limit_bytes } =
            options;
        let options =
            LineOptions { container, follow, tail_lines, since_seconds, timestamps, previous, limit_bytes };
        // Whatever it is, the client asked for lines that there are not.
        self.lines(pod, options).map_err(|error| ApiError::bad_request(error.message))
    }
}
