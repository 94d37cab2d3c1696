//! Serving with a certificate that somebody else made, for clients of somebody else's authority, and changing both while
//! the server runs.

mod common;

use std::io;
use std::path::Path;
use std::time::Duration;

use common::Server;
use federation_apiserver::{Role, ServingConfig};
use tls::{CertificateAuthority, ClientTls, IssuedCertificate, ServerName};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const HOUR: Duration = Duration::from_secs(3600);

/// The status of a request for something that only administrators may read.
async fn ask(server: &Server, ca: &str, name: &str, who: Option<&IssuedCertificate>) -> io::Result<u16> {
    let text = fetch(server, ca, name, who, "/api/v1/secrets").await?;
    text.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(|| io::Error::other(text))
}

/// The answer, head and body.
async fn fetch(
    server: &Server,
    ca: &str,
    name: &str,
    who: Option<&IssuedCertificate>,
    path: &str,
) -> io::Result<String> {
    let identity = who.map(|who| (who.certificate_pem.as_str(), who.key_pem.as_str()));
    let tls = ClientTls::from_pem(ca, identity).expect("client TLS");
    let tcp = TcpStream::connect(server.address).await?;
    let name = ServerName::try_from(name.to_owned()).expect("a name");
    let mut stream = tls.connector(&[b"http/1.1"]).connect(name, tcp).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn write(dir: &Path, issued: &IssuedCertificate) -> ServingConfig {
    let given = ServingConfig { certificate: dir.join("given.crt"), key: dir.join("given.key") };
    std::fs::write(&given.key, &issued.key_pem).expect("written");
    std::fs::write(&given.certificate, &issued.certificate_pem).expect("written");
    given
}

fn tls_name(kubeconfig: &Path) -> Option<String> {
    let text = std::fs::read_to_string(kubeconfig).expect("a kubeconfig");
    let config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    config["clusters"][0]["cluster"]["tls-server-name"].as_str().map(str::to_owned)
}

#[tokio::test]
async fn given_certificates_are_served_and_followed() {
    let dir = tempfile::tempdir().expect("a directory");
    let authority = |name: &str| CertificateAuthority::create(name).expect("an authority");
    let (others, users, strangers) = (authority("others"), authority("users"), authority("strangers"));
    let named = |name: &str| others.issue_server(&[name.to_owned()], HOUR).expect("issued");
    let given = write(dir.path(), &named("hub.example"));
    let users_file = dir.path().join("users.crt");
    std::fs::write(&users_file, users.certificate_pem()).expect("written");
    let server = Server::start(
        Role::Hub,
        |config| {
            config.serving = Some(given.clone());
            config.client_ca_file = Some(users_file.clone());
        },
        |_| {},
    )
    .await;
    let masters = ["system:masters".to_owned()];
    let of = |ca: &CertificateAuthority| ca.issue_client("ann", &masters, HOUR).expect("issued");
    let (ann, stranger) = (of(&users), of(&strangers));
    let trusted = others.certificate_pem();
    assert_eq!(ask(&server, trusted, "hub.example", Some(&ann)).await.expect("an answer"), 200);
    assert_eq!(ask(&server, trusted, "hub.example", None).await.expect("an answer"), 403);
    ask(&server, trusted, "hub.example", Some(&stranger)).await.expect_err("nobody signed for this one");

    // What the server writes itself needs nothing of all that.
    let own_ca = common::authority(&server.kubeconfig);
    let (certificate_pem, key_pem) = common::identity(&server.kubeconfig);
    let admin = IssuedCertificate { certificate_pem, key_pem };
    let name = tls_name(&server.kubeconfig).expect("the kubeconfig asks for the server's own name");
    assert_eq!(ask(&server, &own_ca, &name, Some(&admin)).await.expect("an answer"), 200);
    ask(&server, &own_ca, "hub.example", Some(&admin)).await.expect_err("the given one is another's");

    // Whoever watches sees all four of them end.
    let metrics = fetch(&server, &own_ca, &name, Some(&admin), "/metrics").await.expect("an answer");
    let end = |certificate: &str| {
        let series = format!(
            "cellway_apiserver_certificate_expiry_timestamp_seconds{{certificate=\"{certificate}\"}} "
        );
        let value = metrics.lines().find_map(|line| line.strip_prefix(&series));
        value.unwrap_or_else(|| panic!("no {series}in\n{metrics}")).parse::<u64>().expect("a time")
    };
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
    assert!(end("serving") <= now + HOUR.as_secs(), "the given one");
    assert!(end("own") > now + 80 * 24 * 3600, "the server's own");
    assert!(end("ca") > end("own") && end("client-ca") > now);

    // Both change.
    write(dir.path(), &named("new.example"));
    std::fs::write(&users_file, strangers.certificate_pem()).expect("written");
    let changed = async || match ask(&server, trusted, "new.example", Some(&stranger)).await {
        Ok(200) => Ok(()),
        other => Err(format!("{other:?}")),
    };
    test_support::wait_until(changed, common::LIMIT, "the new files to be in force").await.expect("in time");
    ask(&server, trusted, "new.example", Some(&ann)).await.expect_err("no longer known");
    assert_eq!(ask(&server, &own_ca, &name, Some(&admin)).await.expect("an answer"), 200);
    server.stop().await;

    // Without them it is the server's own certificate for everybody.
    let server = Server::hub().await;
    assert_eq!(tls_name(&server.kubeconfig), None);
    server.stop().await;
}
