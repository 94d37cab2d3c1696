//! `cluster add` and `cluster revoke`: who may join, and who may not any more.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use kube::Api;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tls::ClusterName;

use crate::{
    args::{AddArgs, RevokeArgs},
    error::{Error, Result},
    hub::{FEDERATION_NAMESPACE, Hub, Kind, SYSTEM_NAMESPACE, ensure, explain},
    output::{self, Cell, Paint, Table, colours, text_out},
};

/// Bytes of chance in a token's secret half: beyond guessing.
const SECRET_BYTES: usize = 32;

/// What a new member's agent needs.
#[derive(Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Enrolment {
    pub(crate) cluster: String,
    pub(crate) token: String,
    pub(crate) expires_at: String,
    /// How many agents the token admits.
    pub(crate) uses: u32,
    pub(crate) hub: String,
    pub(crate) ca_hash: String,
    pub(crate) command: String,
    pub(crate) helm_command: String,
    pub(crate) development_command: String,
}

/// Checks a name before anything is sent.
pub(crate) fn cluster_name(name: &str) -> Result<ClusterName> {
    name.parse::<ClusterName>()
        .map_err(|error| Error::usage(format!("take {name:?} as a cluster's name"), error))
}

/// Makes the member known and a token for it, which admits `uses` agents.
pub(crate) async fn enrol(
    hub: &Hub,
    name: &str,
    ttl: std::time::Duration,
    uses: u32,
    address: Option<String>,
) -> Result<Enrolment> {
    cluster_name(name)?;
    let server = hub.server().await?;
    let address = address.unwrap_or_else(|| server.advertised_agents.clone());
    let clusters = hub.objects(Kind::KubeFedCluster, Some(FEDERATION_NAMESPACE));
    // No endpoint: the hub has no address of the member's API, only the tunnels that its agents open.
    let fields = json!({
        "metadata": {"namespace": FEDERATION_NAMESPACE},
        "spec": {},
    });
    let existing = clusters.get_opt(name).await.map_err(explain(format!("look for the cluster {name}")))?;
    if existing.is_none() {
        ensure(&clusters, Kind::KubeFedCluster, name, fields).await?;
    }

    let id = hex::encode(rand::random::<[u8; 6]>());
    let secret = URL_SAFE_NO_PAD.encode(rand::random::<[u8; SECRET_BYTES]>());
    let expires = jiff::SignedDuration::try_from(ttl)
        .ok()
        .and_then(|ttl| jiff::Timestamp::now().checked_add(ttl).ok())
        .ok_or_else(|| {
            Error::usage("make a token", "its time to live is out of range").remedy("give a smaller --ttl")
        })?;
    // Seconds are enough, and every parser takes them.
    let expires = expires.round(jiff::Unit::Second).unwrap_or(expires);
    let secrets: Api<_> = hub.objects(Kind::Secret, Some(SYSTEM_NAMESPACE));
    let fields = json!({
        "metadata": {"namespace": SYSTEM_NAMESPACE, "labels": {"cellway.io/cluster": name}},
        "type": "cellway.io/enrolment-token",
        "stringData": {},
        "data": {
            "cluster": base64_of(name),
            "token-hash": base64_of(&hex::encode(Sha256::digest(secret.as_bytes()))),
            "expires-at": base64_of(&expires.to_string()),
            "uses": base64_of(&uses.to_string()),
        },
    });
    ensure(&secrets, Kind::Secret, &format!("enrolment-{id}"), fields).await?;
    let token = format!("{id}.{secret}");
    Ok(Enrolment {
        command: format!(
            "proxy-agent --cluster-name {name} --server {address} --enrolment-token {token} --ca-hash {} \
             --data-dir /var/lib/cellway-agent",
            server.ca_hash
        ),
        helm_command: helm_command(name, &address, &token, &server.ca_hash),
        development_command: format!(
            "cellway dev member {name} --hub {address} --enrolment-token {token} --ca-hash {}",
            server.ca_hash
        ),
        cluster: name.to_owned(),
        token,
        expires_at: expires.to_string(),
        uses,
        hub: address,
        ca_hash: server.ca_hash,
    })
}

/// The line that installs the chart. Nobody but its owner knows the registry that holds the image.
fn helm_command(name: &str, address: &str, token: &str, ca_hash: &str) -> String {
    format!(
        "helm install cellway-agent charts/agent --namespace cellway-system --create-namespace \
         --set-string cluster={name} --set 'servers={{{address}}}' --set-string enrolment.token={token} \
         --set enrolment.caHash={ca_hash} --set image.repository=REGISTRY/cellway-agent"
    )
}

fn base64_of(text: &str) -> String {
    base64::engine::general_purpose::STANDARD.encode(text)
}

pub(crate) async fn add(args: AddArgs) -> Result<()> {
    cluster_name(&args.name)?;
    if args.ttl.0.is_zero() {
        return Err(Error::usage(
            "make a token",
            "--ttl is zero: it would have expired before anybody used it",
        ));
    }
    let hub = Hub::open(&args.hub).await?;
    let enrolment = enrol(&hub, &args.name, args.ttl.0, args.uses, args.agents_address).await?;
    if !crate::lists::for_people(args.output.output) {
        return output::print(args.output.output, &enrolment, |_| Table::new(""));
    }
    let colour = colours(std::io::IsTerminal::is_terminal(&std::io::stdout()));
    let faint = |text: &str| Paint::Faint.on(text, colour);
    let (agents, times) = match enrolment.uses {
        1 => ("Its agent joins".to_owned(), "once".to_owned()),
        uses => (format!("Up to {uses} agents join"), "once each".to_owned()),
    };
    let several = match enrolment.uses {
        1 => " (one node; for more make the token with --uses NODES)",
        _ => "",
    };
    text_out(&format!(
        "{} is known to the hub. {agents} with this command, {times}, until {}:\n\n  {}\n\n{}\n\n  {}\n\n{}\n\n  {}\n",
        Paint::Bold.on(&enrolment.cluster, colour),
        enrolment.expires_at,
        enrolment.command,
        faint(&format!("or, inside the member, with the chart of this project{several}:")),
        enrolment.helm_command,
        faint("or, for a simulated member on this machine:"),
        enrolment.development_command,
    ))
}

/// `POST /cellway/v1/clusters/NAME/revoke` and `POST /cellway/v1/clusters/NAME/agents/ID/revoke`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Revoked {
    cluster: String,
    /// When it is one agent's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    agent: Option<String>,
    revoked_at: String,
    /// The agent's tunnels to the hub that was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tunnels: Option<u64>,
    /// Enrolment tokens that nobody had used yet.
    tokens_removed: u64,
}

pub(crate) async fn revoke(args: RevokeArgs) -> Result<()> {
    cluster_name(&args.name)?;
    let hub = Hub::open(&args.hub).await?;
    // The hub says when: this machine's clock has nothing to do with that of the certificates.
    let (path, what) = match &args.agent {
        None => (format!("clusters/{}/revoke", args.name), args.name.clone()),
        Some(agent) => (
            format!("clusters/{}/agents/{agent}/revoke", args.name),
            format!("agent {agent} of {}", args.name),
        ),
    };
    let revoked: Revoked = hub.admin_post(&path, &format!("revoke {what}")).await?;
    output::print(args.output.output, &revoked, revoked_table)
}

fn revoked_table(revoked: &Revoked) -> Table {
    let mut row = vec![Cell::new(&revoked.cluster)];
    let mut columns = vec!["CLUSTER"];
    if let Some(agent) = &revoked.agent {
        columns.extend(["AGENT", "TUNNELS"]);
        row.extend([Cell::new(agent), Cell::option(revoked.tunnels)]);
    }
    columns.extend(["REVOKED AT", "TOKENS REMOVED"]);
    row.extend([Cell::new(&revoked.revoked_at).paint(Paint::Warn), Cell::new(revoked.tokens_removed)]);
    let mut table = Table::new("").columns(&columns);
    table.row(row);
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind as ErrorKind;

    #[test]
    fn the_helm_line_is_one_line_that_a_shell_takes_apart_as_meant() {
        let line = helm_command("prod-hz", "[2001:db8::1]:8091", "ab12.c-d_e", "sha256:00ff");
        assert!(!line.contains('\n') && !line.contains("  "), "{line}");
        // Braces and brackets mean something to shells.
        assert!(line.contains(" --set 'servers={[2001:db8::1]:8091}' "), "{line}");
    }

    #[test]
    fn names_are_checked_before_anything_is_sent() {
        assert!(cluster_name("prod-hz").is_ok());
        for bad in ["", "Prod", "a.b", "-a", &"a".repeat(64)] {
            assert_eq!(cluster_name(bad).unwrap_err().kind(), ErrorKind::Usage, "{bad}");
        }
    }
}
