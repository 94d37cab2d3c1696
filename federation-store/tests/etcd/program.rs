//! The program `cellway-store` itself: its flags, its files, its pages, its end.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Output;

use proto::etcd::etcdserverpb::{PutRequest, RangeRequest, kv_client::KvClient};
use test_support::process::Process;
use test_support::{TestDir, free_port, wait_until};
use tls::CertificateAuthority;
use tokio::net::TcpStream;
use tokio::process::Command;
use tonic::transport::Endpoint;

use super::support::{DAY, LONG, page, secure_page};

fn program(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cellway-store"));
    command.current_dir(dir).env_remove("CELLWAY_STORE").args(args).kill_on_drop(true);
    command
}

#[tokio::test]
async fn wrong_flags_are_refused_with_what_to_do() {
    let dir = TestDir::new("store-flags").unwrap();
    let cases: &[(&[&str], i32, &str)] = &[
        (
            &["--listen-client-urls", "127.0.0.1:2379"],
            2,
            "is not http://HOST:PORT, https://HOST:PORT or unix:///PATH",
        ),
        (&["--listen-client-urls", "https://127.0.0.1:0"], 1, "give --cert-file and --key-file"),
        (&["--cert-file", "a.crt"], 2, "go together"),
        (&["--client-cert-auth"], 2, "--client-cert-auth needs --cert-file"),
        (&["--cert-file", "none.crt", "--key-file", "none.key"], 1, "none.crt"),
        (
            &["--store", "oracle://x", "--listen-client-urls", "http://127.0.0.1:0"],
            2,
            "sqlite:///path/to/file",
        ),
        (&["--watch-progress-notify-interval", "0s"], 2, "give a duration above 0"),
        (
            &["--listen-client-urls", "http://127.0.0.1:0", "--auto-compaction-retention", "many"],
            2,
            "a number of hours or a duration",
        ),
        (&["--no-such-flag"], 2, "--no-such-flag"),
        (&["--config", "none.yaml"], 2, "none.yaml"),
    ];
    for (args, code, text) in cases {
        let ended = tokio::time::timeout(LONG, program(dir.path(), args).output()).await;
        let Output { status, stdout, stderr } = ended.expect("it ends at once").unwrap();
        let said = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
        assert!(status.code() == Some(*code) && said.contains(text), "{args:?}: {status}: {said}");
    }
    // What is at a socket's path and is no socket stays there.
    let precious = dir.join("precious.db");
    std::fs::write(&precious, "data").unwrap();
    let url = format!("unix://{}", precious.display());
    let ended = program(dir.path(), &["--listen-client-urls", &url]).output().await.unwrap();
    assert_eq!(ended.status.code(), Some(1));
    assert_eq!(std::fs::read_to_string(&precious).unwrap(), "data");
    // A password in a URL that cannot be used is not told.
    let args = ["--store", "mysql://root:hunter2@127.0.0.1:1/x?no-such=1"];
    let Output { stdout, stderr, .. } = program(dir.path(), &args).output().await.unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(said.contains("no-such") && !said.contains("hunter2"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_and_figures_come_from_files_and_pages() {
    let dir = TestDir::new("store-tls").unwrap();
    let authority = CertificateAuthority::create("first").unwrap();
    let client = authority.issue_client("apiserver", &[], DAY).unwrap();
    let identity = (client.certificate_pem.as_str(), client.key_pem.as_str());
    let serve_as = |authority: &CertificateAuthority| {
        let serving = authority.issue_server(&["127.0.0.1".to_owned()], DAY).unwrap();
        std::fs::write(dir.join("server.key"), &serving.key_pem).unwrap();
        std::fs::write(dir.join("server.crt"), &serving.certificate_pem).unwrap();
    };
    serve_as(&authority);
    std::fs::write(dir.join("ca.crt"), authority.certificate_pem()).unwrap();
    let (secure, plain, metrics) = (free_port().unwrap(), free_port().unwrap(), free_port().unwrap());
    // The file gives what the command line does not.
    let flags = format!(
        "listen-client-urls: https://127.0.0.1:{secure},http://127.0.0.1:{plain}\n\
         cert-file: server.crt\nkey-file: server.key\ntrusted-ca-file: ca.crt\nname: other\n"
    );
    std::fs::write(dir.join("flags.yaml"), flags).unwrap();
    let metrics_url = format!("http://127.0.0.1:{metrics}");
    let args =
        ["--config=flags.yaml", "--store=sqlite://data/store.db", "--listen-metrics-urls", &metrics_url];
    let mut process =
        Process::spawn("cellway-store", program(dir.path(), &args), &dir.join("store.log")).unwrap();
    process.wait_for_line("serving", LONG).await.unwrap();
    assert!(dir.join("data/store.db").is_file());

    let secure = SocketAddr::from(([127, 0, 0, 1], secure));
    let ca = authority.certificate_pem();
    assert!(secure_page(ca, Some(identity), secure).await.unwrap().contains(r#""health":"true""#));
    assert!(secure_page(ca, None, secure).await.is_err());

    let channel =
        Endpoint::from_shared(format!("http://127.0.0.1:{plain}")).unwrap().connect().await.unwrap();
    let mut kv = KvClient::new(channel);
    for value in ["1", "2", "3"] {
        let put = PutRequest { key: "k".into(), value: value.into(), ..PutRequest::default() };
        kv.put(put).await.unwrap();
    }
    let metrics = SocketAddr::from(([127, 0, 0, 1], metrics));
    let ask = async |path: &str| page(TcpStream::connect(metrics).await.unwrap(), path).await.unwrap();
    let text = ask("/metrics").await;
    for line in ["cellway_store_revision 4", "cellway_store_writes_total 3", "program=\"cellway-store\""] {
        assert!(text.contains(line), "no {line} in {text}");
    }
    for path in ["/health", "/readyz", "/livez"] {
        assert!(ask(path).await.starts_with("HTTP/1.1 200"), "{path}");
    }
    // Probes are all that is to be had there.
    let channel = Endpoint::from_shared(metrics_url.clone()).unwrap().connect().await.unwrap();
    KvClient::new(channel)
        .range(RangeRequest { key: "k".into(), ..RangeRequest::default() })
        .await
        .unwrap_err();

    // Another authority's certificate is taken up while the program runs.
    let second = CertificateAuthority::create("second").unwrap();
    serve_as(&second);
    let trusted = async || secure_page(second.certificate_pem(), Some(identity), secure).await;
    wait_until(trusted, LONG, "the new certificate").await.unwrap();
    // Connections stay as they are.
    kv.range(RangeRequest { key: "k".into(), ..RangeRequest::default() }).await.unwrap();

    process.terminate().unwrap();
    let status = process.wait(LONG).await.unwrap();
    assert!(status.success(), "{status}");
}
