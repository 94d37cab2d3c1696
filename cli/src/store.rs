//! `hub backup`, `hub restore` and `hub check`: looking after a hub's SQLite file, without the hub.

use std::path::PathBuf;

use federation_store::files::{self, Checked, FileError};
use serde_json::json;

use crate::{
    args::{CheckArgs, StoreArgs, StoreCommand},
    error::{Error, Result, chain},
    kubeconfig::default_data_dir,
    output::{Format, text_out},
};

pub(crate) async fn run(command: StoreCommand) -> Result<()> {
    match command {
        StoreCommand::Backup(args) => {
            let store = args.of.file()?;
            let checked = files::backup(&store, &args.file)
                .await
                .map_err(|error| failed(format!("back {} up", store.display()), &error))?;
            text_out(&format!(
                "{} keys at revision {} are in {}\n",
                checked.keys,
                checked.revision,
                args.file.display()
            ))
        }
        StoreCommand::Restore(args) => {
            let store = args.of.file()?;
            let revision = files::restore(&args.file, &store)
                .await
                .map_err(|error| failed(format!("restore {}", store.display()), &error))?;
            text_out(&format!(
                "{} goes on at revision {revision}; what was there is in {}.replaced\n",
                store.display(),
                store.display()
            ))
        }
        StoreCommand::Check(args) => check(&args).await,
    }
}

async fn check(args: &CheckArgs) -> Result<()> {
    let store = args.of.file()?;
    let tried = format!("check {}", store.display());
    let checked = files::check(&store).await.map_err(|error| failed(&tried, &error))?;
    let Checked { revision, compacted, keys, rows, faults } = &checked;
    match args.output.output {
        Format::Json | Format::Yaml => {
            let value = json!({
                "store": store, "revision": revision.0, "compactedRevision": compacted.0, "keys": keys,
                "rows": rows, "faults": faults,
            });
            let text = if args.output.output == Format::Json {
                serde_json::to_string_pretty(&value).map_err(|error| Error::failed(&tried, error))? + "\n"
            } else {
                serde_yaml_ng::to_string(&value).map_err(|error| Error::failed(&tried, error))?
            };
            text_out(&text)?;
        }
        _ => text_out(&format!(
            "{keys} keys in {rows} rows at revision {revision}, history from revision {compacted}\n"
        ))?,
    }
    if faults.is_empty() {
        return Ok(());
    }
    Err(Error::failed(&tried, faults.join("; "))
        .remedy("restore a backup, or keep the file and report what happened to it"))
}

impl StoreArgs {
    /// The file that these arguments mean.
    fn file(&self) -> Result<PathBuf> {
        match (&self.store, &self.data_dir) {
            (Some(file), _) => Ok(file.clone()),
            (None, Some(folder)) => Ok(folder.join("store.db")),
            (None, None) => Ok(default_data_dir()?.join("store.db")),
        }
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
