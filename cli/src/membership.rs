//! `cluster add` and `cluster revoke`: who may join, and who may not any more.

use federation_core::names::{FEDERATION_NAMESPACE, SYSTEM_NAMESPACE};
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, api::PostParams};
use proxy_server::{enrol::EnrolmentToken, hub::tokens, rows::Revoked};
use serde::Serialize;
use serde_json::json;
use tls::ClusterName;

use crate::{
    args::{AddArgs, RevokeArgs},
    error::{Error, Result},
    hub::{Hub, Kind, ensure, explain},
    output::{self, Cell, Paint, Table, colours, text_out},
};

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
    let cluster = cluster_name(name)?;
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

    let expires = jiff::SignedDuration::try_from(ttl)
        .ok()
        .and_then(|ttl| jiff::Timestamp::now().checked_add(ttl).ok())
        .ok_or_else(|| {
            Error::usage("make a token", "its time to live is out of range").remedy("give a smaller --ttl")
        })?;
    // Seconds are enough, and every parser takes them.
    let expires = expires.round(jiff::Unit::Second).unwrap_or(expires);
    let token = EnrolmentToken::generate();
    let record = tokens::record(&token, &cluster, expires, uses);
    let secrets: Api<Secret> = Api::namespaced(hub.client().clone(), SYSTEM_NAMESPACE);
    secrets
        .create(&PostParams::default(), &record)
        .await
        .map_err(explain(format!("keep a token for {name} at the hub")))?;
    let token = token.reveal();
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
        "helm install cellway-agent charts/agent --namespace {SYSTEM_NAMESPACE} --create-namespace \
         --set-string cluster={name} --set 'servers={{{address}}}' --set-string enrolment.token={token} \
         --set enrolment.caHash={ca_hash} --set image.repository=REGISTRY/cellway-agent"
    )
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
