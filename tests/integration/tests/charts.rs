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

/// What `cellway cluster add` fills in.
const HASH: &str = "sha256:abababababababababababababababababababababababababababababababab";
const REQUIRED: [(&str, &str); 5] = [
    ("--set-string", "cluster=prod-hz"),
    ("--set", "servers={hub.example:8091,[2001:db8::1]:8091}"),
    ("--set-string", "enrolment.token=0123456789ab.c-d_e"),
    ("--set-string", "enrolment.caHash="),
    ("--set", "image.repository=registry.example/cellway-agent"),
];

/// Every other value that changes what is rendered.
const EVERYTHING: &str = r#"
enrolment: {token: "", existingSecret: joined-by-hand}
image: {tag: "1.2", pullSecrets: [{name: registry}]}
identity: {hostPath: ""}
transport: h2
egressProxy: http://proxy.example:3128
allow: ["db.internal:5432", "10.0.0.0/8:443,8443"]
extraArgs: ["--v=4"]
rbac: {impersonateUsers: [jane], impersonateGroups: ["system:cellway:controllers"], controllersClusterRole: ""}
serviceAccount: {name: reached-by, annotations: {example.com/owner: network}}
affinity: {nodeAffinity: {}}
tolerations: [{operator: Exists}]
priorityClassName: system-node-critical
podAnnotations: {example.com/scrape: "true"}
podLabels: {team: network}
"#;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

async fn helm(program: &Path, verb: &[&str], without: Option<&str>, values: &str) -> Result<(bool, String)> {
    let mut command = Command::new(program);
    command.args(verb).arg(root().join("charts/agent"));
    for (flag, value) in
        REQUIRED.iter().filter(|(_, value)| without.is_none_or(|name| !value.starts_with(name)))
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

async fn render(program: &Path, without: Option<&str>, values: &str) -> Result<String> {
    let verb = ["template", "cellway-agent", "--namespace", "cellway-system"];
    let (done, text) = helm(program, &verb, without, values).await?;
    ensure!(done, "{text}");
    Ok(text)
}

/// Compares with `golden/<name>`; writes it when `CELLWAY_WRITE_GOLDEN` is set.
fn compare(name: &str, text: &str) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name);
    if std::env::var_os("CELLWAY_WRITE_GOLDEN").is_some() {
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

/// The agent's flags in a rendering are flags of this build's agent, and make a configuration.
fn agent_accepts(text: &str) -> Result<()> {
    let args = text.lines().skip_while(|line| line.trim() != "args:").skip(1);
    let args = args.map(str::trim).take_while(|line| line.starts_with("- "));
    let mut argv = vec!["proxy-agent".to_owned()];
    for arg in args {
        let arg = arg.trim_start_matches("- ").trim_matches('"');
        // Files of a pod are not here; the flags themselves are what counts.
        match arg.split_once('=') {
            Some(("--enrolment-token-file", _)) => {
                argv.push("--enrolment-token=0123456789ab.c-d_e".to_owned())
            }
            Some(("--gateway", value)) => {
                ensure!(value == "on", "a member without its API is of no use");
                argv.push("--gateway=off".to_owned());
            }
            _ => argv.push(arg.to_owned()),
        }
    }
    ensure!(argv.len() > 8, "no flags were found: {argv:?}");
    let parsed = flags::try_parse::<proxy_agent::Args>(&argv)?;
    proxy_agent::Config::try_from(parsed.args).with_context(|| format!("{argv:?}"))?;
    Ok(())
}

#[tokio::test]
async fn the_agents_chart_renders_what_it_should() -> Result<()> {
    let helm = require!(tools::helm());
    for (name, without, values) in [
        ("agent-chart.yaml", None, "{}"),
        ("agent-chart-everything.yaml", Some("enrolment.token"), EVERYTHING),
    ] {
        let (fine, said) = self::helm(&helm, &["lint", "--strict"], without, values).await?;
        ensure!(fine, "{name}: {said}");
        let text = render(&helm, without, values).await?;
        compare(name, &text)?;
        agent_accepts(&text).with_context(|| name.to_owned())?;
    }
    Ok(())
}

#[tokio::test]
async fn the_agents_chart_refuses_what_cannot_work() -> Result<()> {
    let helm = require!(tools::helm());
    let template = ["template", "cellway-agent"];
    for (without, _) in REQUIRED.iter().map(|(_, value)| value.split_once('=').unwrap_or((value, ""))) {
        let (done, said) = self::helm(&helm, &template, Some(without), "{}").await?;
        let field = without.rsplit('.').next().unwrap_or(without);
        ensure!(!done && said.contains(field), "without {without}: {said}");
    }
    for (values, named) in [
        ("transport: tcp", "transport"),
        ("identity: {hostPath: relative}", "hostPath"),
        ("extraArgs: [v=4]", "extraArgs"),
        ("rbac: {impersonateUser: [jane]}", "impersonateUser"),
        ("imagePullPolicy: Always", "imagePullPolicy"),
    ] {
        let (done, said) = self::helm(&helm, &template, None, values).await?;
        if done || !said.contains(named) {
            bail!("{values}: {said}");
        }
    }
    Ok(())
}
