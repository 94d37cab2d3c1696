//! `hub`: everything a hub is, in this process.

use std::process::ExitCode;

use proxy_server::hub::Hub;
use service::{flags::Effective, signals::Signals};

use crate::{
    args::HubCommand,
    error::{Error, Result, chain},
    folder,
    kubeconfig::default_data_dir,
    parent,
};

pub(crate) async fn run(mut command: HubCommand, effective: Effective) -> Result<ExitCode> {
    let log = command.log.init().map_err(|error| Error::usage("set up the log", chain(&error)))?;
    let mut signals = Signals::install().map_err(|error| Error::failed("listen for signals", error))?;
    let data_dir = command.hub.data_dir.take().map_or_else(default_data_dir, Ok)?;
    folder::keep(&data_dir, command.child.until_input_closes)?;
    command.hub.data_dir = Some(data_dir);
    let hub = Hub::bind(command.hub, effective, Some(log)).await.map_err(|error| match error.is_usage() {
        true => Error::usage("start the hub", chain(&error)),
        false => Error::failed("start the hub", chain(&error)),
    })?;
    let deadline = hub.drain_timeout();
    let (drain, watch) = service::drain::channel();
    let run = hub.run(watch);
    let stop = async {
        tokio::select! {
            signal = signals.recv() => tracing::info!(signal, "draining; a second signal cuts"),
            () = parent::gone(command.child.until_input_closes) => tracing::info!("whoever started this has ended"),
        }
        service::signals::drain(drain, deadline, &mut signals).await
    };
    parent::run(run, stop).await.map_err(|error| Error::failed("keep the hub running", chain(&error)))
}
