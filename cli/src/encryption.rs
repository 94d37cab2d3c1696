//! `hub encryption`: what of the hub's objects is under which key, and moving on to the current one.

use serde::{Deserialize, Serialize};

use crate::{
    args::{EncryptionCommand, HubQueryArgs},
    error::{Error, Result},
    hub::{Hub, explain},
    output::{self, Cell, Paint, Table},
    upkeep,
};

/// `GET /encryption`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    configured: bool,
    /// Objects that are not under the current key; `None` where a KMS plug-in has not said which one that is.
    stale: Option<u64>,
    objects: Vec<Group>,
    /// What is wrong with KMS plug-ins.
    #[serde(default)]
    problems: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Group {
    resource: String,
    /// Provider and key: `aesgcm/key1`, `kms/NAME/KEY-ID`, `identity`.
    key: String,
    objects: u64,
    stale: Option<u64>,
}

pub(crate) async fn run(command: EncryptionCommand) -> Result<()> {
    match command {
        EncryptionCommand::Status(args) => status(args).await,
        EncryptionCommand::Rewrite(args) => rewrite(args).await,
    }
}

async fn status(args: HubQueryArgs) -> Result<()> {
    const TRIED: &str = "ask what is under which key";
    let hub = Hub::open(&args.hub).await?;
    let request = http::Request::get("/encryption").body(Vec::new()).map_err(|e| Error::usage(TRIED, e))?;
    let status: Status = hub.with_store(TRIED)?.request(request).await.map_err(explain(TRIED))?;
    output::print(args.output.output, &status, table)
}

fn table(status: &Status) -> Table {
    let mut table = Table::new("no objects").columns(&["RESOURCE", "KEY", "OBJECTS", "UNDER AN OLD KEY"]);
    for group in &status.objects {
        let (stale, paint) = match group.stale {
            Some(0) => ("0".to_owned(), Paint::Plain),
            Some(stale) => (stale.to_string(), Paint::Bad),
            None => ("unknown".to_owned(), Paint::Bad),
        };
        table.row(vec![
            Cell::new(&group.resource),
            Cell::new(&group.key),
            Cell::new(group.objects),
            Cell::new(stale).paint(paint),
        ]);
    }
    for problem in &status.problems {
        let none = Cell::option::<u64>;
        table.row(vec![
            Cell::new("a KMS plug-in is not well").paint(Paint::Bad),
            Cell::new(problem).paint(Paint::Bad),
            none(None),
            none(None),
        ]);
    }
    table
}

async fn rewrite(args: HubQueryArgs) -> Result<()> {
    const TRIED: &str = "rewrite what is under an old key";
    let hub = Hub::open(&args.hub).await?;
    let done = upkeep::follow(&hub, "/upkeep/rewrite", TRIED).await?;
    if done.failed > 0 {
        let first = done.failed_keys.first().map_or("", String::as_str);
        return Err(Error::failed(
            TRIED,
            format!(
                "{} objects were rewritten, {} were not, {first} among them",
                done.rewritten, done.failed
            ),
        )
        .remedy(
            "see the hub's log; the former keys have to stay in the configuration until all are rewritten",
        ));
    }
    let text = format!("{} objects rewritten under the current key; {}", done.rewritten, upkeep::room(&done));
    upkeep::print(&args, &done, &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plug_in_that_is_not_well_is_in_the_table() {
        let status: Status = serde_json::from_value(serde_json::json!({
            "configured": true, "stale": null, "problems": ["KMS provider vault: connection refused"],
            "objects": [{"resource": "secrets", "key": "kms/vault/1", "objects": 3, "stale": null}],
        }))
        .unwrap();
        let text = table(&status).render(false, false);
        assert!(text.contains("secrets") && text.contains("unknown"), "{text}");
        assert!(text.contains("not well   KMS provider vault: connection refused"), "{text}");
    }
}
