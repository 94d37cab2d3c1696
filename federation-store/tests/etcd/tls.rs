//! Clients are known by their certificates.

use std::net::SocketAddr;
use std::time::SystemTime;

use federation_store::etcd::{EtcdConfig, ListenError, ListenUrl, Listener};
use proto::etcd::etcdserverpb::{PutRequest, PutResponse, WatchCreateRequest};
use tls::{CertificateAuthority, ClientAuth, ClientTls, IssuedCertificate, ServerTls};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tonic::transport::Endpoint;

use super::support::{Clients, DAY, Server, clients, ours_behind, secure_page};

/// Our server, which lets in whom its authority has given a client's certificate.
struct Guarded {
    server: Server,
    authority: CertificateAuthority,
    /// The server's own.
    serving: IssuedCertificate,
    /// Of one who is let in.
    client: IssuedCertificate,
}

impl Guarded {
    async fn start() -> Self {
        let authority = CertificateAuthority::create("clients").unwrap();
        let serving = authority.issue_server(&["127.0.0.1".to_owned()], DAY).unwrap();
        let client = authority.issue_client("apiserver", &[], DAY).unwrap();
        let ca = Some(authority.certificate_pem());
        let auth = ClientAuth::Required;
        let tls = ServerTls::from_pem(&serving.certificate_pem, &serving.key_pem, ca, auth).unwrap();
        let server = ours_behind(EtcdConfig::default(), Some(&tls)).await;
        Self { server, authority, serving, client }
    }

    fn ca(&self) -> &str {
        self.authority.certificate_pem()
    }
}

/// A certificate as a client shows it.
fn pair(issued: &IssuedCertificate) -> (&str, &str) {
    (&issued.certificate_pem, &issued.key_pem)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_without_a_certificate_is_refused() {
    let url: ListenUrl = "https://127.0.0.1:0".parse().unwrap();
    assert!(matches!(Listener::bind(&url, None).await, Err(ListenError::NoTls { .. })));
    let guarded = Guarded::start().await;
    let health = async |identity: Option<(&str, &str)>| {
        secure_page(guarded.ca(), identity, guarded.server.address()).await
    };
    let text = health(Some(pair(&guarded.client))).await.unwrap();
    assert!(text.contains(r#""health":"true""#), "{text}");
    assert!(health(None).await.is_err());
    let stranger = CertificateAuthority::create("others").unwrap().issue_client("x", &[], DAY).unwrap();
    assert!(health(Some(pair(&stranger))).await.is_err());
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
    let guarded = Guarded::start().await;
    let Guarded { server, authority, serving, client } = &guarded;
    let (ca, address) = (guarded.ca(), server.address());
    let store = server.store.clone().unwrap();
    let mut tasks = JoinSet::new();
    let known = over_tls(address, ca, Some(pair(client)), &mut tasks).await;
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
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(said).await.unwrap();
        loiterers.push(stream);
    }
    let others = CertificateAuthority::create("others").unwrap();
    let stranger = others.issue_client("apiserver", &[], DAY).unwrap();
    // Its own authority's word was good until yesterday.
    let expired = authority.issue_client_at("apiserver", &[], DAY, SystemTime::now() - 3 * DAY).unwrap();
    for identity in [None, Some(&stranger), Some(&expired), Some(serving)] {
        for _ in 0..4 {
            let refused = over_tls(address, ca, identity.map(pair), &mut tasks).await;
            put(&refused, "refused").await.unwrap_err();
        }
    }
    // Without TLS at all.
    let plain = clients(Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy());
    put(&plain, "refused").await.unwrap_err();

    // Who was there goes on over the same connection, and sees that nothing was written in between.
    let revision = store.revision();
    let answer = put(&known, "second").await.unwrap();
    assert_eq!(answer.header.unwrap().revision, revision.0 as i64 + 1);
    let told = watching.next().await;
    let keys: Vec<_> = told.events.iter().map(|event| event.kv.clone().unwrap().key).collect();
    assert_eq!(keys, ["second"]);
    // And who comes now is let in.
    let newcomer = over_tls(address, ca, Some(pair(client)), &mut tasks).await;
    put(&newcomer, "third").await.unwrap();
    drop(loiterers);
}
