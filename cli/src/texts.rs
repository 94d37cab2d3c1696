//! Commands that print a text: `kubeconfig`, `crds`, `completion`.

use clap::CommandFactory as _;
use clap_complete::Shell;
use federation_core::api::Conversion;
use serde::Deserialize as _;
use serde_json::{Value, json};

use crate::{
    args::{Args, CrdsArgs, KubeconfigArgs},
    error::{Error, Result},
    kubeconfig::through_hub,
    membership::cluster_name,
    output::{self, Format, text_out},
};

pub(crate) fn kubeconfig(args: &KubeconfigArgs) -> Result<()> {
    let path = args.hub.find()?;
    let tried = format!("read {}", path.display());
    let text = std::fs::read_to_string(&path).map_err(|error| Error::failed(&tried, error))?;
    let text = match &args.cluster {
        Some(cluster) => {
            cluster_name(cluster)?;
            through_hub(&text, cluster).map_err(|problem| Error::failed(&tried, problem))?
        }
        None => text,
    };
    if args.output.output != Format::Json {
        return text_out(&text);
    }
    let value: serde_json::Value =
        serde_yaml_ng::from_str(&text).map_err(|error| Error::failed(&tried, error))?;
    let text = serde_json::to_string_pretty(&value).map_err(|error| Error::failed(&tried, error))?;
    text_out(&format!("{text}\n"))
}

pub(crate) fn crds(args: &CrdsArgs) -> Result<()> {
    let conversion = match (&args.webhook_url, &args.webhook_ca) {
        (Some(url), Some(path)) => {
            let tried = format!("read {}", path.display());
            let ca_bundle = std::fs::read_to_string(path).map_err(|error| Error::failed(tried, error))?;
            Conversion::Webhook { url: url.clone(), ca_bundle }
        }
        // clap sees to it that they come together.
        _ => Conversion::Unserved,
    };
    let text =
        federation_core::crds_yaml(&conversion).map_err(|error| Error::failed("print the CRDs", error))?;
    if args.output.output != Format::Json {
        return text_out(&text);
    }
    let items: Result<Vec<Value>, _> =
        serde_yaml_ng::Deserializer::from_str(&text).map(Value::deserialize).collect();
    let items = items.map_err(|error| Error::failed("print the CRDs", error))?;
    text_out(&output::json(&json!({"apiVersion": "v1", "kind": "List", "items": items}))?)
}

pub(crate) fn completion(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "cellway", &mut script);
    text_out(&String::from_utf8_lossy(&script))
}
