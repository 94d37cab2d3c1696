//! Clients are known by their certificates.

use std::time::Duration;

use federation_store::etcd::{EtcdConfig, EtcdServer, ListenError, ListenUrl, Listener};
use federation_store::{Store, StoreConfig};
use service::drain;
use tls::{CertificateAuthority, ClientAuth, ClientTls, ServerTls};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const DAY: Duration = Duration::from_secs(86_400);

#[tokio::test(flavor = "multi_thread")]
async fn a_client_without_a_certificate_is_refused() {
    let authority = CertificateAuthority::create("clients").unwrap();
    let serving = authority.issue_server(&["127.0.0.1".to_owned()], DAY).unwrap();
    let client = authority.issue_client("apiserver", &[], DAY).unwrap();
    let ca = authority.certificate_pem();
    let server_tls =
        ServerTls::from_pem(&serving.certificate_pem, &serving.key_pem, Some(ca), ClientAuth::Required)
            .unwrap();
    let store = Store::open(StoreConfig::in_memory()).await.unwrap();
    let server = EtcdServer::new(store, EtcdConfig::default());
    let url: ListenUrl = "https://127.0.0.1:0".parse().unwrap();
    assert!(matches!(Listener::bind(&url, None).await, Err(ListenError::NoTls { .. })));
    let listener = Listener::bind(&url, Some(&server_tls)).await.unwrap();
    let address = listener.address().unwrap();
    let (_drain, watch) = drain::channel();
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(listener.serve(server.router(), watch));

    let get = async |identity: Option<(&str, &str)>| -> std::io::Result<String> {
        let tls = ClientTls::from_pem(ca, identity).unwrap();
        let stream = tokio::net::TcpStream::connect(address).await?;
        let name = tls::ServerName::try_from("127.0.0.1").unwrap();
        let mut stream = tls.connector(&[b"http/1.1"]).connect(name, stream).await?;
        stream.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok(text)
    };
    let text = get(Some((&client.certificate_pem, &client.key_pem))).await.unwrap();
    assert!(text.contains(r#""health":"true""#), "{text}");
    assert!(get(None).await.is_err());
    let stranger = CertificateAuthority::create("others").unwrap().issue_client("x", &[], DAY).unwrap();
    assert!(get(Some((&stranger.certificate_pem, &stranger.key_pem))).await.is_err());
}
