//! Work on a hub's whole store that takes its time: the hub does it by itself, here it is begun and followed.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    args::HubQueryArgs,
    error::{Error, Result},
    hub::{Hub, explain},
    output::{self, Format, text_out},
};

/// How often the hub is asked how far it is.
const POLL: Duration = Duration::from_secs(1);

/// `GET /upkeep` of the hub API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Progress {
    id: u32,
    /// What is being done; `finished` at the end.
    step: String,
    objects: u64,
    looked_at: u64,
    pub(crate) rewritten: u64,
    pub(crate) failed: u64,
    #[serde(default)]
    pub(crate) failed_keys: Vec<String>,
    size_before: u64,
    size_after: u64,
    problem: Option<String>,
}

/// `hub compact`.
pub(crate) async fn compact(args: HubQueryArgs) -> Result<()> {
    const TRIED: &str = "give up the history of the store";
    let hub = Hub::open(&args.hub).await?;
    let done = follow(&hub, "/upkeep/compact", TRIED).await?;
    print(&args, &done, &room(&done))
}

/// Has the hub begin, tells on stderr how far it is, and returns when it has ended. It goes on when this does not.
pub(crate) async fn follow(hub: &Hub, path: &str, tried: &str) -> Result<Progress> {
    let request = http::Request::post(path).body(Vec::new()).map_err(|e| Error::usage(tried, e))?;
    let client = hub.with_store(tried)?;
    let mut progress: Progress = client.request(request).await.map_err(explain(tried))?;
    let id = progress.id;
    let mut told = String::new();
    while progress.step != "finished" {
        let text = describe(&progress);
        if text != told {
            eprintln!("{}", output::visible(&text));
            told = text;
        }
        tokio::time::sleep(POLL).await;
        let request = http::Request::get("/upkeep").body(Vec::new()).map_err(|e| Error::usage(tried, e))?;
        progress = client.request(request).await.map_err(explain(tried))?;
        if progress.id != id {
            return Err(Error::failed(
                tried,
                "the hub that was at it was restarted, or another one answers now",
            )
            .remedy("run it again: what was done by then stays done"));
        }
    }
    match &progress.problem {
        // Whoever asked says more of it.
        Some(problem) if progress.failed == 0 => {
            Err(Error::failed(tried, problem).remedy("see the hub's log, then run it again"))
        }
        _ => Ok(progress),
    }
}

/// The result for programs, or a text for people.
pub(crate) fn print(args: &HubQueryArgs, done: &Progress, text: &str) -> Result<()> {
    match args.output.output {
        Format::Json => text_out(&output::json(done)?),
        Format::Yaml => text_out(&output::yaml(done)?),
        Format::Table | Format::Wide => text_out(&format!("{text}\n")),
    }
}

/// What became of the room.
pub(crate) fn room(done: &Progress) -> String {
    format!(
        "the history is gone; the store took {} and takes {}",
        mebibytes(done.size_before),
        mebibytes(done.size_after)
    )
}

fn describe(progress: &Progress) -> String {
    match progress.step.as_str() {
        "rewriting" => format!(
            "{} of {} objects looked at, {} rewritten",
            progress.looked_at, progress.objects, progress.rewritten
        ),
        "compacting" => "giving up the history".to_owned(),
        "givingRoomBack" => "giving its room back; writes may wait".to_owned(),
        other => other.to_owned(),
    }
}

fn mebibytes(bytes: u64) -> String {
    let tenths = bytes.saturating_mul(10) >> 20;
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_hub_says_is_understood() {
        let text = r#"{"id":7,"job":"rewrite","step":"rewriting","objects":1200,"lookedAt":500,"rewritten":20,
            "failed":0,"failedKeys":[],"sizeBefore":3145728,"sizeAfter":0,"problem":null}"#;
        let progress: Progress = serde_json::from_str(text).unwrap();
        assert_eq!(describe(&progress), "500 of 1200 objects looked at, 20 rewritten");
        assert_eq!(room(&progress), "the history is gone; the store took 3.0 MiB and takes 0.0 MiB");
    }
}
