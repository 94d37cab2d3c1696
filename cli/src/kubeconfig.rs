//! Kubeconfig files: finding the hub's, and making one that leads to a member through the hub.

use std::path::{Path, PathBuf};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use federation_apiserver::SERVER_CONTEXT;
use kube::config::Kubeconfig;
use serde::Deserialize;
use serde_yaml_ng::Value;

use crate::error::{Error, Result};

/// Which hub a command talks to. What the command line says, by either flag, goes before what the environment says; clap's
/// own `env` cannot tell the two apart.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct HubRef {
    /// The hub's admin kubeconfig [env: CELLWAY_KUBECONFIG, unless --data-dir is given].
    #[arg(long, value_name = "FILE", conflicts_with = "data_dir")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// The hub's data folder, which holds admin.kubeconfig [env: CELLWAY_DATA_DIR] [default: ~/.cellway].
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
}

/// What is read of a kubeconfig: enough for TLS without a Kubernetes client.
#[derive(Deserialize)]
struct File {
    #[serde(rename = "current-context", default)]
    current_context: String,
    #[serde(default)]
    contexts: Vec<Named<ContextEntry>>,
    #[serde(default)]
    clusters: Vec<Named<ClusterEntry>>,
    #[serde(default)]
    users: Vec<Named<UserEntry>>,
}

#[derive(Deserialize)]
struct Named<T> {
    name: String,
    #[serde(alias = "context", alias = "cluster", alias = "user")]
    entry: T,
}

#[derive(Deserialize)]
struct ContextEntry {
    cluster: String,
    user: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ClusterEntry {
    server: String,
    certificate_authority_data: Option<String>,
    certificate_authority: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct UserEntry {
    client_certificate_data: Option<String>,
    client_certificate: Option<PathBuf>,
    client_key_data: Option<String>,
    client_key: Option<PathBuf>,
}

/// Where a kubeconfig leads to the hub itself, and as whom.
pub(crate) struct Credentials {
    pub(crate) server: String,
    pub(crate) ca_pem: String,
    pub(crate) certificate_pem: String,
    pub(crate) key_pem: String,
}

/// `~/.cellway`, where `up` and `hub` keep their data unless told otherwise.
pub(crate) fn default_data_dir() -> Result<PathBuf> {
    std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cellway")).ok_or_else(|| {
        Error::usage("find the data folder", "HOME is not set").remedy("name the folder with --data-dir")
    })
}

/// What an environment variable says; an empty one says nothing.
pub(crate) fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Where the demo lives, so that it never touches a hub in earnest.
pub(crate) fn default_demo_dir() -> Result<PathBuf> {
    Ok(default_data_dir()?.join("demo"))
}

impl HubRef {
    /// The kubeconfig that these arguments mean.
    pub(crate) fn find(&self) -> Result<PathBuf> {
        let in_folder = |folder: PathBuf| folder.join("admin.kubeconfig");
        let flag = self.kubeconfig.clone().or_else(|| self.data_dir.clone().map(in_folder));
        let environment =
            || variable("CELLWAY_KUBECONFIG").or_else(|| variable("CELLWAY_DATA_DIR").map(in_folder));
        match flag.or_else(environment) {
            Some(file) => existing(vec![file]),
            None => existing(vec![in_folder(default_data_dir()?), in_folder(default_demo_dir()?)]),
        }
    }
}

/// The context that leads to the hub itself where the current one leads to a Kubernetes API of somebody else, which holds
/// the hub's objects. A hub that serves them itself has one context for both.
fn hub_context_of(current: &str) -> String {
    format!("{SERVER_CONTEXT}{current}")
}

/// The name of that context, when the kubeconfig has one.
pub(crate) fn hub_context(kubeconfig: &Kubeconfig) -> Option<String> {
    let own = hub_context_of(kubeconfig.current_context.as_deref()?);
    kubeconfig.contexts.iter().any(|context| context.name == own).then_some(own)
}

fn existing(candidates: Vec<PathBuf>) -> Result<PathBuf> {
    if let Some(found) = candidates.iter().find(|file| file.is_file()) {
        return Ok(found.clone());
    }
    let looked: Vec<_> = candidates.iter().map(|file| file.display().to_string()).collect();
    Err(Error::not_found("find the hub", format!("no file {}", looked.join(" nor ")))
        .remedy("`cellway up` starts a hub; --kubeconfig or --data-dir names one that runs already"))
}

impl Credentials {
    /// Reads server, CA, certificate and key of the context that leads to the hub itself.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let tried = format!("read {}", path.display());
        let text = std::fs::read_to_string(path).map_err(|error| Error::failed(&tried, error))?;
        let folder = path.parent().unwrap_or(Path::new("."));
        Self::parse(&text, folder).map_err(|problem| {
            Error::failed(tried, problem)
                .remedy("a kubeconfig with a client certificate is needed, as the hub writes it")
        })
    }

    fn parse(text: &str, folder: &Path) -> Result<Self, String> {
        let file: File = serde_yaml_ng::from_str(text).map_err(|error| error.to_string())?;
        let own = hub_context_of(&file.current_context);
        let names_own = file.contexts.iter().any(|context| context.name == own);
        let context = pick(&file.contexts, if names_own { &own } else { &file.current_context }, "context")?;
        let cluster = pick(&file.clusters, &context.cluster, "cluster")?;
        let user = pick(&file.users, &context.user, "user")?;
        Ok(Self {
            server: cluster.server.clone(),
            ca_pem: pem(
                "certificate-authority",
                cluster.certificate_authority_data.as_ref(),
                cluster.certificate_authority.as_ref(),
                folder,
            )?,
            certificate_pem: pem(
                "client-certificate",
                user.client_certificate_data.as_ref(),
                user.client_certificate.as_ref(),
                folder,
            )?,
            key_pem: pem("client-key", user.client_key_data.as_ref(), user.client_key.as_ref(), folder)?,
        })
    }

    /// The host of the server's URL, without port and brackets.
    pub(crate) fn host(&self) -> Result<String> {
        let uri: http::Uri = self
            .server
            .parse()
            .map_err(|error| Error::failed(format!("read the server's address {}", self.server), error))?;
        let host = uri.host().unwrap_or_default();
        Ok(host.trim_start_matches('[').trim_end_matches(']').to_owned())
    }
}

fn pick<'a, T>(entries: &'a [Named<T>], name: &str, what: &str) -> Result<&'a T, String> {
    entries
        .iter()
        .find(|entry| entry.name == name)
        .map(|entry| &entry.entry)
        .ok_or_else(|| format!("there is no {what} called {name:?} in it"))
}

fn pem(what: &str, data: Option<&String>, file: Option<&PathBuf>, folder: &Path) -> Result<String, String> {
    let bytes = match (data, file) {
        (Some(data), _) => {
            STANDARD.decode(data.trim()).map_err(|error| format!("{what}-data is not base64: {error}"))?
        }
        (None, Some(file)) => {
            let path = folder.join(file);
            std::fs::read(&path)
                .map_err(|error| format!("{what} {} cannot be read: {error}", path.display()))?
        }
        (None, None) => return Err(format!("it has no {what}")),
    };
    String::from_utf8(bytes).map_err(|_| format!("{what} is not PEM"))
}

/// A kubeconfig with the same user whose requests go to `cluster` through the hub.
pub(crate) fn through_hub(text: &str, cluster: &str) -> Result<String, String> {
    let mut file: Value = serde_yaml_ng::from_str(text).map_err(|error| error.to_string())?;
    let current = file["current-context"].as_str().ok_or("it has no current-context")?.to_owned();
    let named = |list: &Value, name: &str, key: &str| -> Option<Value> {
        list.as_sequence()?
            .iter()
            .find(|entry| entry["name"].as_str() == Some(name))
            .map(|entry| entry[key].clone())
    };
    let context = named(&file["contexts"], &hub_context_of(&current), "context")
        .or_else(|| named(&file["contexts"], &current, "context"))
        .ok_or("its current context is not in it")?;
    let (hub, user) = (context["cluster"].as_str(), context["user"].as_str());
    let (Some(hub), Some(user)) = (hub, user) else {
        return Err("its context names no cluster or user".into());
    };
    let mut server = named(&file["clusters"], hub, "cluster").ok_or("its context's cluster is not in it")?;
    let address =
        server["server"].as_str().ok_or("its cluster has no server")?.trim_end_matches('/').to_owned();
    server["server"] = Value::from(format!("{address}/clusters/{cluster}"));
    let credentials = named(&file["users"], user, "user").ok_or("its context's user is not in it")?;

    let entry = |name: &str, key: &str, value: Value| {
        let mut map = serde_yaml_ng::Mapping::new();
        map.insert("name".into(), name.into());
        map.insert(key.into(), value);
        Value::from(vec![Value::from(map)])
    };
    let mut context = serde_yaml_ng::Mapping::new();
    context.insert("cluster".into(), cluster.into());
    context.insert("user".into(), user.into());
    file["clusters"] = entry(cluster, "cluster", server);
    file["contexts"] = entry(cluster, "context", Value::from(context));
    file["users"] = entry(user, "user", credentials);
    file["current-context"] = cluster.into();
    serde_yaml_ng::to_string(&file).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = r"
apiVersion: v1
kind: Config
current-context: hub
contexts: [{name: hub, context: {cluster: hub, user: admin}}, {name: other, context: {cluster: o, user: o}}]
clusters:
- {name: o, cluster: {server: 'https://o:1'}}
- {name: hub, cluster: {server: 'https://127.0.0.1:6443/', certificate-authority-data: Q0E=}}
users:
- {name: admin, user: {client-certificate-data: Q0VSVA==, client-key-data: S0VZ}}
";

    #[test]
    fn reads_the_current_context() {
        let credentials = Credentials::parse(SAMPLE, Path::new(".")).unwrap();
        assert_eq!(credentials.server, "https://127.0.0.1:6443/");
        assert_eq!(
            (credentials.ca_pem.as_str(), credentials.certificate_pem.as_str(), credentials.key_pem.as_str()),
            ("CA", "CERT", "KEY")
        );
        assert_eq!(credentials.host().unwrap(), "127.0.0.1");
        let broken = SAMPLE.replace("current-context: hub", "current-context: gone");
        assert!(Credentials::parse(&broken, Path::new(".")).err().unwrap().contains("gone"));
    }

    #[test]
    fn the_hub_itself_may_have_a_context_of_its_own() {
        let elsewhere = SAMPLE
            .replace("current-context: hub", "current-context: stock")
            .replace("contexts: [{name: hub,", "contexts: [{name: 'cellway:stock',")
            .replace("{name: other,", "{name: stock,");
        let credentials = Credentials::parse(&elsewhere, Path::new(".")).unwrap();
        assert_eq!(
            (credentials.server.as_str(), credentials.key_pem.as_str()),
            ("https://127.0.0.1:6443/", "KEY")
        );
        let text = through_hub(&elsewhere, "east").unwrap();
        let value: Value = serde_yaml_ng::from_str(&text).unwrap();
        assert_eq!(value["clusters"][0]["cluster"]["server"], "https://127.0.0.1:6443/clusters/east");
        let parse = |text: &str| Kubeconfig::from_yaml(text).unwrap();
        assert_eq!(hub_context(&parse(&elsewhere)).as_deref(), Some("cellway:stock"));
        assert_eq!(hub_context(&parse(SAMPLE)), None);
    }

    #[test]
    fn leads_to_a_member_through_the_hub() {
        let text = through_hub(SAMPLE, "east").unwrap();
        let value: Value = serde_yaml_ng::from_str(&text).unwrap();
        assert_eq!(value["current-context"], "east");
        assert_eq!(value["clusters"].as_sequence().unwrap().len(), 1);
        assert_eq!(value["clusters"][0]["cluster"]["server"], "https://127.0.0.1:6443/clusters/east");
        assert_eq!(value["contexts"][0]["context"]["user"], "admin");
        assert_eq!(value["users"][0]["user"]["client-key-data"], "S0VZ");
        assert!(through_hub("{}", "east").is_err());
    }
}
