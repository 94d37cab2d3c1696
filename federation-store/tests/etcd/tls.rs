//! Clients are known by their certificates.

use std::net::SocketAddr;
use std::time::SystemTime;

use federation_store::etcd::{EtcdConfig, EtcdServer, ListenError, ListenUrl, Listener};
use federation_store::{Store, StoreConfig};
use proto::etcd::etcdserverpb::{PutRequest, PutResponse, WatchCreateRequest};
use service::drain;
use tls::{CertificateAuthority, ClientAuth, ClientTls, ServerTls};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tonic::transport::Endpoint;

use super::support::{Clients, DAY, clients, ours_behind};

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
    let mut tasks = JoinSet::new();
    tasks.spawn(listener.serve(server.router(), watch));

    let get = async |identity: Option<(&str, &str)>| -> std::io::Result<String> {
        let tls = ClientTls::from_pem(ca, identity).unwrap();
        let stream = TcpStream::connect(address).await?;
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

/// gRPC clients of `server` over TLS: what they say to a plain port of the test's goes on with this certificate or none.
async fn over_tls(
    server: SocketAddr,
    ca: &str,
    identity: Option<(&str, &str)>,
    tasks: &mut JoinSet<()>,
) -> Clients {
    let tls = ClientTls::from_pem(ca, identity).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tasks.spawn(async move {
        let mut relays = JoinSet::new();
        while let Ok((mut near, _)) = listener.accept().await {
            let connector = tls.connector(&[b"h2"]);
            relays.spawn(async move {
                let name = tls::ServerName::try_from("127.0.0.1").unwrap();
                let far = TcpStream::connect(server).await.unwrap();
                // Refused, the near end is closed, which is what its client sees.
                if let Ok(mut far) = connector.connect(name, far).await {
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                }
            });
        }
    });
    clients(Endpoint::from_shared(url).unwrap().connect_lazy())
}

async fn put(clients: &Clients, key: &str) -> Result<PutResponse, tonic::Status> {
    let put = PutRequest { key: key.to_owned().into(), value: "1".into(), ..PutRequest::default() };
    clients.kv.clone().put(put).await.map(tonic::Response::into_inner)
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_write_nothing_and_disturb_nobody() {
    let authority = CertificateAuthority::create("clients").unwrap();
    let serving = authority.issue_server(&["127.0.0.1".to_owned()], DAY).unwrap();
    let client = authority.issue_client("apiserver", &[], DAY).unwrap();
    let ca = authority.certificate_pem();
    let server_tls =
        ServerTls::from_pem(&serving.certificate_pem, &serving.key_pem, Some(ca), ClientAuth::Required)
            .unwrap();
    let server = ours_behind(EtcdConfig::default(), Some(&server_tls)).await;
    let store = server.store.clone().unwrap();
    let mut tasks = JoinSet::new();
    let known = Some((client.certificate_pem.as_str(), client.key_pem.as_str()));
    let known = over_tls(server.address(), ca, known, &mut tasks).await;
    put(&known, "first").await.unwrap();
    let mut watching = known.watching();
    let request = WatchCreateRequest {
        key: "\0".into(),
        range_end: "\0".into(),
        start_revision: store.revision().0 as i64 + 1,
        ..WatchCreateRequest::default()
    };
    assert!(watching.create(request).await.created);

    // One who says nothing, one who hangs up in the middle of a handshake, one who talks of other things: all of them stay
    // connected until the end.
    let mut loiterers = Vec::new();
    for said in [&b""[..], b"\x16\x03\x01\x02\x00\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[0xff; 4096]] {
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        stream.write_all(said).await.unwrap();
        loiterers.push(stream);
    }
    let others = CertificateAuthority::create("others").unwrap();
    let stranger = others.issue_client("apiserver", &[], DAY).unwrap();
    // Its own authority's word was good until yesterday.
    let expired = authority.issue_client_at("apiserver", &[], DAY, SystemTime::now() - 3 * DAY).unwrap();
    for identity in [None, Some(&stranger), Some(&expired), Some(&serving)] {
        let identity = identity.map(|issued| (issued.certificate_pem.as_str(), issued.key_pem.as_str()));
        for _ in 0..4 {
            let refused = over_tls(server.address(), ca, identity, &mut tasks).await;
            put(&refused, "refused").await.unwrap_err();
        }
    }
    // Without TLS at all.
    let plain =
        clients(Endpoint::from_shared(format!("http://{}", server.address())).unwrap().connect_lazy());
    put(&plain, "refused").await.unwrap_err();

    // Who was there goes on over the same connection, and sees that nothing was written in between.
    let revision = store.revision();
    let answer = put(&known, "second").await.unwrap();
    assert_eq!(answer.header.unwrap().revision, revision.0 as i64 + 1);
    let told = watching.next().await;
    let keys: Vec<_> = told.events.iter().map(|event| event.kv.clone().unwrap().key).collect();
    assert_eq!(keys, ["second"]);
    // And who comes now is let in.
    let newcomer = Some((client.certificate_pem.as_str(), client.key_pem.as_str()));
    put(&over_tls(server.address(), ca, newcomer, &mut tasks).await, "third").await.unwrap();
    drop(loiterers);
}
