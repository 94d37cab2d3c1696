//! The Helm charts, with a real `helm`: linted, rendered as in `golden/`, and the flags that they give are flags that the
//! programs take.

#![allow(clippy::print_stdout)] // what was not run is said

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, bail, ensure};
use service::flags;
use test_support::{require, tools};
use tokio::process::Command;

const HASH: &str = "sha256:abababababababababababababababababababababababababababababababab";

/// A chart, and the least that it needs.
struct Chart {
    name: &'static str,
    required: &'static [(&'static str, &'static str)],
}

/// What `cellway cluster add` fills in.
const AGENT: Chart = Chart {
    name: "agent",
    required: &[
        ("--set-string", "cluster=prod-hz"),
        ("--set", "servers={hub.example:8091,[2001:db8::1]:8091}"),
        ("--set-string", "enrolment.token=0123456789ab.c-d_e"),
        ("--set-string", "enrolment.caHash="),
        ("--set", "image.repository=registry.example/cellway-agent"),
    ],
};

const HUB: Chart = Chart {
    name: "hub",
    required: &[
        ("--set", "advertiseAddress=hub.example"),
        ("--set", "image.repository=registry.example/cellway-hub"),
    ],
};

/// Every other value that changes what is rendered.
const AGENT_EVERYTHING: &str = r#"
enrolment: {token: "", existingSecret: joined-by-hand}
image: {tag: "1.2", pullSecrets: [{name: registry}]}
identity: {hostPath: ""}
transport: h2
egressProxy: http://proxy.example:3128
allow: ["db.internal:5432", "10.0.0.0/8:443,8443"]
extraArgs: ["--v=4"]
rbac: {impersonateUsers: [jane], impersonateGroups: ["system:cellway:controllers"], controllersClusterRole: "", adminsClusterRole: view}
serviceAccount: {name: reached-by, annotations: {example.com/owner: network}}
affinity: {nodeAffinity: {}}
tolerations: [{operator: Exists}]
priorityClassName: system-node-critical
monitoring: {serviceMonitor: {enabled: true, interval: 1m, labels: {release: prometheus}}, prometheusRule: {enabled: true, labels: {release: prometheus}}}
podAnnotations: {example.com/scrape: "true"}
podLabels: {team: network}
"#;

const HUB_EVERYTHING: &str = r#"
image: {tag: "1.2", pullPolicy: Always, pullSecrets: [{name: registry}]}
agents: {port: 18091, quic: false, service: {type: NodePort, annotations: {example.com/pool: outside}}}
api: {port: 443, service: {type: LoadBalancer, annotations: {example.com/pool: inside}}}
connect: {port: 18090}
healthPort: 18092
agentCertificateTTL: 12h
persistence: {size: 20Gi, storageClass: fast}
store: {existingSecret: cellway-database}
files: {tlsSecret: hub-tls, clientCASecret: users-ca, encryptionSecret: keys, tokensSecret: tokens, auditPolicySecret: audit}
env: [{name: TOKIO_WORKER_THREADS, value: "4"}]
extraVolumes: [{name: kms, hostPath: {path: /run/kms}}]
extraVolumeMounts: [{name: kms, mountPath: /run/kms}]
extraArgs: ["--v=4"]
affinity: {nodeAffinity: {}}
tolerations: [{operator: Exists}]
monitoring: {serviceMonitor: {enabled: true, labels: {release: prometheus}, apiSecret: cellway-hub-scrape}, prometheusRule: {enabled: true}}
podAnnotations: {example.com/scrape: "true"}
podLabels: {team: network}
"#;

/// With an API of somebody else, and as after `helm upgrade --reuse-values` from a release that had none of these values.
const HUB_STOCK: &str = r#"
stockApi: {kubeconfigSecret: cellway-stock, webhook: {service: {annotations: {example.com/pool: inside}}, allowFrom: ["10.0.0.0/28", "2001:db8::/64"]}}
files: {clientCASecret: stock-ca}
monitoring: null
store: null
env: null
extraVolumes: null
extraVolumeMounts: null
"#;

/// The hub's flags as `cellway hub` has them.
#[derive(clap::Parser)]
struct HubFlags {
    #[command(flatten)]
    _hub: proxy_server::hub::HubArgs,
    #[command(flatten)]
    _log: service::log::LogArgs,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

async fn helm(
    program: &Path,
    chart: &Chart,
    verb: &[&str],
    without: Option<&str>,
    values: &str,
) -> Result<(bool, String)> {
    let mut command = Command::new(program);
    command.args(verb).arg(root().join("charts").join(chart.name));
    for (flag, value) in
        chart.required.iter().filter(|(_, value)| without.is_none_or(|name| !value.starts_with(name)))
    {
        let hash = if value.ends_with("caHash=") { HASH } else { "" };
        command.args([*flag, &format!("{value}{hash}")]);
    }
    // Files come before --set, whatever their order: what is here must be free of both.
    command.args(["--values", "-"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context("helm does not start")?;
    let mut input = child.stdin.take().context("no input")?;
    tokio::io::AsyncWriteExt::write_all(&mut input, values.as_bytes()).await?;
    drop(input);
    let output = child.wait_with_output().await?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8(text)?))
}

/// Compares with `golden/<name>`; writes it when `CELLWAY_WRITE_GOLDEN` is set.
fn compare(name: &str, text: &str) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name);
    if tools::write_golden() {
        std::fs::write(&path, text)?;
        return Ok(());
    }
    let golden = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    for (number, (is, should)) in text.lines().zip(golden.lines()).enumerate() {
        ensure!(
            is == should,
            "golden/{name}, line {}:\n  rendered {is}\n  golden   {should}\nif that is meant, write it anew with \
             CELLWAY_WRITE_GOLDEN=1",
            number + 1
        );
    }
    ensure!(text.lines().count() == golden.lines().count(), "golden/{name}: one of the two is longer");
    Ok(())
}

/// The arguments of the container in a rendering.
fn arguments(text: &str) -> Result<Vec<String>> {
    let args = text.lines().skip_while(|line| line.trim() != "args:").skip(1);
    let args = args.map(str::trim).take_while(|line| line.starts_with("- "));
    let args: Vec<_> = args.map(|arg| arg.trim_start_matches("- ").trim_matches('"').to_owned()).collect();
    ensure!(args.len() > 8, "no arguments were found: {args:?}");
    Ok(args)
}

/// The agent's flags are flags of this build's agent, and make a configuration.
fn agent_accepts(args: Vec<String>) -> Result<()> {
    let mut argv = vec!["proxy-agent".to_owned()];
    for arg in args {
        // Files of a pod are not here; the flags themselves are what counts.
        match arg.split_once('=') {
            Some(("--enrolment-token-file", _)) => {
                argv.push("--enrolment-token=0123456789ab.c-d_e".to_owned())
            }
            Some(("--gateway", value)) => {
                ensure!(value == "on", "a member without its API is of no use");
                argv.push("--gateway=off".to_owned());
            }
            _ => argv.push(arg),
        }
    }
    let parsed = flags::try_parse::<proxy_agent::Args>(&argv)?;
    proxy_agent::Config::try_from(parsed.args).with_context(|| format!("{argv:?}"))?;
    Ok(())
}

/// The first argument is `cellway`'s subcommand, the others are its flags.
fn hub_accepts(args: Vec<String>) -> Result<()> {
    ensure!(args[0] == "hub", "{args:?}");
    flags::try_parse::<HubFlags>(&args)?;
    Ok(())
}

async fn renders_what_it_should(
    chart: &Chart,
    values: &[(&str, Option<&str>, &str)],
    accepts: fn(Vec<String>) -> Result<()>,
) -> Result<()> {
    let program = require!(tools::helm());
    for &(golden, without, values) in values {
        let (fine, said) = helm(&program, chart, &["lint", "--strict"], without, values).await?;
        ensure!(fine, "{golden}: {said}");
        let release = format!("cellway-{}", chart.name);
        let verb = ["template", &release, "--namespace", "cellway-system"];
        let (done, text) = helm(&program, chart, &verb, without, values).await?;
        ensure!(done, "{golden}: {text}");
        compare(golden, &text)?;
        accepts(arguments(&text)?).with_context(|| golden.to_owned())?;
    }
    Ok(())
}

/// `helm upgrade --reuse-values` gives a chart the values of the release's former one: those that came since are not there.
#[tokio::test]
async fn values_of_a_former_release_are_enough() -> Result<()> {
    let program = require!(tools::helm());
    let former = [
        (
            &HUB,
            "{monitoring: null, store: null, files: null, stockApi: null, env: null, extraVolumes: null, extraVolumeMounts: null}",
        ),
        (&HUB, "{stockApi: {kubeconfigSecret: x, webhook: null}, files: null, store: null}"),
        (&AGENT, "{monitoring: null}"),
    ];
    for (chart, values) in former {
        let (done, said) = helm(&program, chart, &["template", "cellway"], None, values).await?;
        ensure!(done, "{}: {values}: {said}", chart.name);
    }
    Ok(())
}

/// Without a value that is required, and with each of these, nothing is rendered and the value is named.
async fn refuses_what_cannot_work(chart: &Chart, bad: &[(&str, &str)]) -> Result<()> {
    let program = require!(tools::helm());
    let template = ["template", "cellway"];
    for (_, value) in chart.required {
        let without = value.split('=').next().unwrap_or(value);
        let (done, said) = helm(&program, chart, &template, Some(without), "{}").await?;
        let field = without.rsplit('.').next().unwrap_or(without);
        ensure!(!done && said.contains(field), "without {without}: {said}");
    }
    for (values, named) in bad {
        let (done, said) = helm(&program, chart, &template, None, values).await?;
        if done || !said.contains(named) {
            bail!("{values}: {said}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_agents_chart_renders_what_it_should() -> Result<()> {
    let values = [
        ("agent-chart.yaml", None, "{}"),
        ("agent-chart-everything.yaml", Some("enrolment.token"), AGENT_EVERYTHING),
    ];
    renders_what_it_should(&AGENT, &values, agent_accepts).await
}

#[tokio::test]
async fn the_hubs_chart_renders_what_it_should() -> Result<()> {
    let values = [
        ("hub-chart.yaml", None, "{}"),
        ("hub-chart-everything.yaml", None, HUB_EVERYTHING),
        ("hub-chart-stock.yaml", None, HUB_STOCK),
    ];
    renders_what_it_should(&HUB, &values, hub_accepts).await
}

#[tokio::test]
async fn the_charts_refuse_what_cannot_work() -> Result<()> {
    let bad = [
        ("transport: tcp", "transport"),
        ("identity: {hostPath: relative}", "hostPath"),
        ("extraArgs: [v=4]", "extraArgs"),
        ("rbac: {impersonateUser: [jane]}", "impersonateUser"),
        ("monitoring: {serviceMonitor: {interval: often}}", "interval"),
        ("imagePullPolicy: Always", "imagePullPolicy"),
    ];
    refuses_what_cannot_work(&AGENT, &bad).await?;
    let bad = [
        ("replicas: 2", "replicas"),
        ("agents: {port: 0}", "port"),
        ("agentCertificateTTL: long", "agentCertificateTTL"),
        ("api: {service: {type: Ingress}}", "type"),
        ("monitoring: {podMonitor: {enabled: true}}", "podMonitor"),
        ("extraVolumes: [{name: cellway-tls, emptyDir: {}}]", "extraVolumes"),
        ("stockApi: {webhook: {allowFrom: [everybody]}}", "allowFrom"),
        ("{stockApi: {kubeconfigSecret: x}, store: {existingSecret: db}}", "store.existingSecret"),
        ("{stockApi: {kubeconfigSecret: x}, files: {tokensSecret: tok}}", "the Secret tok"),
    ];
    refuses_what_cannot_work(&HUB, &bad).await
}
