//! `hub backup`, `hub restore` and `hub check`: looking after a hub's SQLite file, without the hub.

use std::{
    path::{Path, PathBuf},
    time::SystemTime,
};

use federation_store::{
    Location,
    files::{self, Checked, Exceptions, FileError, Restored},
};
use proxy_server::hub::revocations;
use serde_json::{Value, json};

use crate::{
    args::{CheckArgs, StoreArgs, StoreCommand},
    error::{Error, Result, chain},
    folder,
    kubeconfig::{default_data_dir, variable},
    output::{self, Format, text_out},
};

pub(crate) async fn run(command: StoreCommand) -> Result<()> {
    match command {
        StoreCommand::Backup(args) => {
            let store = args.of.file()?;
            let checked = files::backup(&store, &args.file)
                .await
                .map_err(|error| failed(format!("back up {}", store.display()), &error))?;
            let text = format!(
                "{} keys at revision {} are in {}\n",
                checked.keys,
                checked.revision,
                args.file.display()
            );
            let value = json!({"file": args.file.display().to_string(), "keys": checked.keys, "revision": checked.revision.0});
            say(args.output.output, &value, &text)
        }
        StoreCommand::Restore(args) => {
            let store = args.of.file()?;
            folder::keep(store.parent().unwrap_or(Path::new(".")), false)?;
            let exceptions =
                Exceptions { carried_over: revocations::CARRIED_OVER, left_out: revocations::LEFT_OUT };
            let restored = files::restore(&args.file, &store, SystemTime::now(), exceptions).await;
            let Restored { revision, replaced, carried_over } =
                restored.map_err(|error| failed(format!("restore {}", store.display()), &error))?;
            let value = json!({
                "store": store.display().to_string(), "revision": revision.0,
                "replaced": replaced.as_ref().map(|path| path.display().to_string()),
                "revocationsCarriedOver": carried_over.as_ref().ok(),
                "revocationsUnknown": carried_over.as_ref().err(),
            });
            let replaced = match replaced {
                Some(path) => format!("what was there is in {}", path.display()),
                None => "nothing was there before".to_owned(),
            };
            let revoked = match carried_over {
                Ok(count) => format!("newer records of revocations taken over from there: {count}"),
                Err(why) => format!(
                    "revocations of after the backup are not known here ({why}): once the hub runs, revoke again what was \
                     revoked since (`cellway cluster revoke`), before anything else"
                ),
            };
            let text = format!(
                "{} goes on at revision {revision}; {replaced}\n{revoked}\nenrolment tokens of the backup are left out: make new ones\n",
                store.display()
            );
            say(args.output.output, &value, &text)
        }
        StoreCommand::Check(args) => check(&args).await,
    }
}

/// The result for programs, or the text for people.
fn say(format: Format, value: &Value, text: &str) -> Result<()> {
    match format {
        Format::Json => text_out(&output::json(value)?),
        Format::Yaml => text_out(&output::yaml(value)?),
        Format::Table | Format::Wide => text_out(text),
    }
}

async fn check(args: &CheckArgs) -> Result<()> {
    let store = args.of.location()?;
    let tried = format!("check {store}");
    let checked = files::check_at(&store).await.map_err(|error| failed(&tried, &error))?;
    let store = store.sqlite_path().map_or_else(|| store.to_string(), |path| path.display().to_string());
    let Checked { revision, compacted, keys, rows, faults } = &checked;
    let value = json!({
        "store": store, "revision": revision.0, "compactedRevision": compacted.0, "keys": keys,
        "rows": rows, "faults": faults,
    });
    let text =
        format!("{keys} keys in {rows} rows at revision {revision}, history from revision {compacted}\n");
    say(args.output.output, &value, &text)?;
    if faults.is_empty() {
        return Ok(());
    }
    Err(Error::failed(&tried, faults.join("; "))
        .remedy("restore a backup, or keep the file and report what happened to it"))
}

impl StoreArgs {
    /// The database that these arguments mean.
    fn location(&self) -> Result<Location> {
        // As the hub itself takes it; a password is seen by nobody there.
        let store = match (&self.store, &self.data_dir) {
            (Some(store), _) => Some(store.clone()),
            (None, Some(_)) => None,
            (None, None) => std::env::var("CELLWAY_STORE").ok().filter(|store| !store.is_empty()),
        };
        match store {
            Some(store) if store.contains("://") => {
                Location::parse(&store).map_err(|error| Error::usage("find the data", chain(&error)))
            }
            Some(file) => Ok(Location::sqlite(file)),
            None => {
                let folder = self.data_dir.clone().or_else(|| variable("CELLWAY_DATA_DIR"));
                let folder = folder.map_or_else(default_data_dir, Ok)?;
                Ok(Location::sqlite(folder.join("store.db")))
            }
        }
    }

    /// The file that these arguments mean.
    fn file(&self) -> Result<PathBuf> {
        let location = self.location()?;
        location.sqlite_path().map(Path::to_owned).ok_or_else(|| {
            Error::usage(format!("find the file of {location}"), "it is no SQLite file").remedy(
                "back such a database up and restore it with its own tools, such as pg_dump or mariadb-dump",
            )
        })
    }
}

fn failed(tried: impl Into<String>, error: &FileError) -> Error {
    match error {
        FileError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            Error::not_found(tried, chain(error)).remedy("name the hub's folder with --data-dir")
        }
        _ => Error::failed(tried, chain(error)),
    }
}
