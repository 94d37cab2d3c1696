//! Enrolment and renewal against a scripted hub on loopback.

use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tls::{CertificateAuthority, ClientAuth, ServerTls};
use tokio::{net::TcpListener, task::JoinSet};

use super::*;

const HOUR: Duration = Duration::from_secs(3600);
const PATIENCE: Duration = Duration::from_secs(20);

/// How the hub answers.
#[derive(Clone, Copy, PartialEq)]
enum Script {
    Good,
    /// Certificates end after six seconds: renewal has two of them, which a busy machine may need.
    ShortLived,
    /// The certificate is another cluster's.
    OtherCluster,
    /// For a key that is not the request's.
    OtherKey,
    Refuses,
    Garbage,
}

struct Hub {
    authority: Arc<CertificateAuthority>,
    address: String,
    script: Arc<Mutex<Script>>,
    /// For each request: the bearer token, or the identity of the certificate.
    seen: Arc<Mutex<Vec<String>>>,
    _tasks: JoinSet<()>,
}

async fn hub() -> Hub {
    let authority = Arc::new(CertificateAuthority::create("hub").unwrap());
    let server = authority.issue_server(&["127.0.0.1".to_owned()], HOUR).unwrap();
    let ca = Some(authority.certificate_pem());
    let tls =
        ServerTls::from_pem(&server.certificate_pem, &server.key_pem, ca, ClientAuth::Optional).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let script = Arc::new(Mutex::new(Script::Good));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = JoinSet::new();
    let (issuer, scripted, record) = (authority.clone(), script.clone(), seen.clone());
    tasks.spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let Ok(stream) = tls.acceptor(&[b"http/1.1"]).accept(tcp).await else { continue };
            let peer = stream
                .get_ref()
                .1
                .peer_certificates()
                .map(|chain| agent_identity(&chain[0]).unwrap().to_string());
            let service = service_fn(|request: Request<Incoming>| {
                let bearer =
                    request.headers().get("authorization").map(|value| value.to_str().unwrap().to_owned());
                record.lock().push(bearer.or(peer.clone()).unwrap_or_default());
                let (issuer, script) = (issuer.clone(), *scripted.lock());
                async move {
                    assert_eq!((request.uri().path(), request.method().as_str()), (PATH, "POST"));
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    Ok::<_, std::convert::Infallible>(answer(&issuer, script, &body))
                }
            });
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        }
    });
    Hub { authority, address, script, seen, _tasks: tasks }
}

const PATH: &str = "/cellway/v1/certificates";

fn answer(authority: &CertificateAuthority, script: Script, body: &[u8]) -> Response<Full<Bytes>> {
    let respond = |code: StatusCode, body: String| {
        let mut response = Response::new(Full::new(Bytes::from(body)));
        *response.status_mut() = code;
        response
    };
    let ask: serde_json::Value = serde_json::from_slice(body).unwrap();
    let cluster = if script == Script::OtherCluster { "other" } else { "prod-hz" };
    let agent = ask["agentId"].as_str().unwrap();
    let identity = format!("spiffe://cellway.local/cluster/{cluster}/agent/{agent}").parse().unwrap();
    let request = match script {
        Script::Refuses => {
            let status = r#"{"kind":"Status","message":"the token was used already"}"#;
            return respond(StatusCode::UNAUTHORIZED, status.to_owned());
        }
        Script::Garbage => return respond(StatusCode::OK, "<html>".to_owned()),
        Script::OtherKey => AgentKey::generate().unwrap().certificate_request().unwrap(),
        _ => ask["csr"].as_str().unwrap().to_owned(),
    };
    let ttl = if script == Script::ShortLived { Duration::from_secs(6) } else { HOUR };
    let certificate = authority.sign_agent(&request, &identity, ttl).unwrap();
    let body = serde_json::json!({
        "certificate": certificate, "ca": authority.certificate_pem(), "cluster": cluster, "trustDomain": "cellway.local",
    });
    respond(StatusCode::OK, body.to_string())
}

fn keeper(hub: &Hub, data_dir: &Path, hash: CaHash) -> IdentityKeeper {
    keeper_with(hub, data_dir, hash, "abc.secret")
}

fn keeper_with(hub: &Hub, data_dir: &Path, hash: CaHash, token: &str) -> IdentityKeeper {
    let config = IdentityConfig::Enrolled {
        data_dir: data_dir.to_owned(),
        token: EnrolmentToken::parse(token),
        ca_hash: Some(hash),
        cluster: Some("prod-hz".parse().unwrap()),
        agent_id: Some("a1".parse().unwrap()),
    };
    let (_, servers) = watch::channel(vec![hub.address.clone()]);
    let client = CertificateClient { egress_proxy: None, server_name: None };
    IdentityKeeper::new(config, client, servers, Metrics::default())
}

/// One attempt, as `enrol` makes them.
async fn attempt(hub: &Hub, keeper: &IdentityKeeper, hash: CaHash) -> Result<(), AttemptError> {
    let token = EnrolmentToken::parse("abc.secret").unwrap();
    let cluster = "prod-hz".parse().unwrap();
    let key = AgentKey::generate().unwrap();
    keeper.enrol_at(&hub.address, &token, hash, &key, Some(&cluster), "a1").await.map(drop)
}

#[tokio::test]
async fn an_agent_enrols_once_and_is_itself_after_a_restart() {
    let hub = hub().await;
    let directory = tempfile::tempdir().unwrap();
    let data_dir = directory.path().join("agent");
    let keeper = keeper(&hub, &data_dir, hub.authority.public_key_hash());
    assert!(keeper.load().unwrap().is_none());
    let credentials = keeper.enrol().await.unwrap();
    assert_eq!((credentials.cluster.as_str(), credentials.agent_id.as_str()), ("prod-hz", "a1"));
    assert_eq!(*hub.seen.lock(), ["Bearer abc.secret"]);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&data_dir.join(AGENT_FILE)), 0o600);
    assert_eq!(mode(&data_dir), 0o700);

    let again = self::keeper(&hub, &data_dir, hub.authority.public_key_hash()).load().unwrap().unwrap();
    assert_eq!(again.tls.certificate(), credentials.tls.certificate());

    // A renewal shows the certificate, not the token, and takes a new key.
    let before = credentials.tls.certificate();
    let key = fs::read_to_string(data_dir.join(AGENT_FILE)).unwrap();
    keeper.renew_at(&hub.address, &data_dir, &credentials).await.unwrap();
    assert_eq!(hub.seen.lock()[1], "spiffe://cellway.local/cluster/prod-hz/agent/a1");
    assert_ne!(credentials.tls.certificate(), before, "new tunnels use the new certificate");
    let new_key = fs::read_to_string(data_dir.join(AGENT_FILE)).unwrap();
    assert_ne!(key.split("-----END").next(), new_key.split("-----END").next());
}

#[tokio::test]
async fn a_new_token_enrols_anew_and_a_bad_one_changes_nothing() {
    let hub = hub().await;
    let directory = tempfile::tempdir().unwrap();
    let hash = hub.authority.public_key_hash();
    let first = keeper(&hub, directory.path(), hash).enrol().await.unwrap();
    let again = keeper_with(&hub, directory.path(), hash, "def.secret");
    assert!(again.load().unwrap().is_none());
    let second = again.enrol().await.unwrap();
    assert_eq!(*hub.seen.lock(), ["Bearer abc.secret", "Bearer def.secret"]);
    assert_ne!(first.tls.certificate(), second.tls.certificate());
    assert!(again.load().unwrap().is_some(), "the token was used: a restart does not show it again");

    *hub.script.lock() = Script::Refuses;
    let bad = keeper_with(&hub, directory.path(), hash, "ghi.secret");
    let third = tokio::time::timeout(PATIENCE, bad.enrol()).await.unwrap().unwrap();
    assert_eq!(third.tls.certificate(), second.tls.certificate());
}

#[tokio::test]
async fn a_token_is_shown_once_whatever_the_disk_does() {
    let hub = hub().await;
    let hash = hub.authority.public_key_hash();

    // Which token it was cannot be noted: the agent is enrolled all the same, and is so after a restart.
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir_all(directory.path().join(TOKEN_FILE).join("in-the-way")).unwrap();
    let keeper = self::keeper(&hub, directory.path(), hash);
    tokio::time::timeout(PATIENCE, keeper.enrol()).await.unwrap().unwrap();
    assert_eq!(hub.seen.lock().len(), 1);
    assert!(keeper.load().unwrap().is_some());

    // The certificate cannot be kept: it waits for the disk, and does not ask again.
    let directory = tempfile::tempdir().unwrap();
    let in_the_way = directory.path().join(AGENT_FILE);
    fs::create_dir_all(in_the_way.join("in-the-way")).unwrap();
    let keeper = self::keeper(&hub, directory.path(), hash);
    let make_room = async {
        // The CA is written before the certificate.
        while !directory.path().join(CA_FILE).exists() {
            tokio::task::yield_now().await;
        }
        fs::remove_dir_all(&in_the_way).unwrap();
    };
    let (enrolled, ()) =
        tokio::time::timeout(PATIENCE, async { tokio::join!(keeper.enrol(), make_room) }).await.unwrap();
    enrolled.unwrap();
    assert_eq!(hub.seen.lock().len(), 2);
}

#[tokio::test]
async fn an_agent_that_was_killed_while_it_enrolled_asks_again_as_the_same() {
    let hub = hub().await;
    let directory = tempfile::tempdir().unwrap();
    let hash = hub.authority.public_key_hash();
    let unnamed = |token: &str| {
        let mut keeper = keeper_with(&hub, directory.path(), hash, token);
        if let IdentityConfig::Enrolled { agent_id, .. } = &mut keeper.config {
            *agent_id = None;
        }
        keeper
    };
    // Its answer is lost, and then the process.
    *hub.script.lock() = Script::Garbage;
    let asked = async {
        while hub.seen.lock().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    let killed = unnamed("abc.secret");
    tokio::time::timeout(PATIENCE, async {
        tokio::select! { _ = killed.enrol() => panic!("there was no answer"), () = asked => {} }
    })
    .await
    .unwrap();
    let file = directory.path().join(PENDING_FILE);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!fs::read_to_string(&file).unwrap().contains("secret"), "the token is not written down");
    let begun: PendingFile = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();

    *hub.script.lock() = Script::Good;
    let enrolled = tokio::time::timeout(PATIENCE, unnamed("abc.secret").enrol()).await.unwrap().unwrap();
    assert_eq!(enrolled.agent_id, begun.agent_id);
    let kept = fs::read_to_string(directory.path().join(AGENT_FILE)).unwrap();
    assert!(kept.starts_with(&begun.key), "with the same key");
    assert!(!file.exists());

    // One of another token, of another name, or damaged is none.
    fs::write(&file, serde_json::to_vec(&begun).unwrap()).unwrap();
    let token = |text: &str| EnrolmentToken::parse(text).unwrap();
    let read = |token: &EnrolmentToken, name: Option<&str>| {
        Pending::read(&file, token, name.map(|name| name.parse().unwrap()).as_ref()).is_some()
    };
    assert!(read(&token("abc.other"), None), "the secret half is no part of it");
    assert!(!read(&token("def.secret"), None) && !read(&token("abc.secret"), Some("a1")));
    fs::write(&file, "{}").unwrap();
    assert!(!read(&token("abc.secret"), None));
}

#[test]
fn a_data_folder_becomes_private() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent");
    fs::create_dir(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    private_folder(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
    private_folder(&path.join("a/b")).unwrap();
    fs::write(directory.path().join("file"), "").unwrap();
    private_folder(&directory.path().join("file")).unwrap_err();
}

#[tokio::test]
async fn nothing_is_kept_of_a_bad_answer() {
    let hub = hub().await;
    let directory = tempfile::tempdir().unwrap();
    let data_dir = directory.path();
    let hash = hub.authority.public_key_hash();
    let keeper = keeper(&hub, data_dir, hash);
    for (script, refusal) in [
        (Script::OtherCluster, false),
        (Script::OtherKey, false),
        (Script::Refuses, true),
        (Script::Garbage, false),
    ] {
        *hub.script.lock() = script;
        let error = attempt(&hub, &keeper, hash).await.unwrap_err();
        let refused = matches!(&error, AttemptError::Request(error) if error.is_refusal());
        assert_eq!(refused, refusal, "{error}");
        if refused {
            assert!(error.to_string().contains("the token was used already"), "{error}");
        }
        assert!(!data_dir.join(AGENT_FILE).exists());
    }
    // Another hub, by its hash: the token does not reach it.
    *hub.script.lock() = Script::Good;
    let asked = hub.seen.lock().len();
    let other = CertificateAuthority::create("other").unwrap().public_key_hash();
    let error = attempt(&hub, &keeper, other).await.unwrap_err();
    assert!(matches!(error, AttemptError::Request(RequestError::Connect { .. })));
    assert_eq!(hub.seen.lock().len(), asked);
}

#[tokio::test]
async fn certificates_are_renewed_before_they_end() {
    let hub = hub().await;
    *hub.script.lock() = Script::ShortLived;
    let directory = tempfile::tempdir().unwrap();
    let keeper = keeper(&hub, directory.path(), hub.authority.public_key_hash());
    let credentials = keeper.enrol().await.unwrap();
    let first = credentials.tls.certificate();
    let renewed = async {
        while credentials.tls.certificate() == first {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, async {
        tokio::select! { () = keeper.keep(&credentials) => {}, () = renewed => {} }
    })
    .await
    .unwrap();
    assert!(keeper.metrics.certificate_expiry.get() > keeper.metrics.certificate_lifetime.get());
    assert!(keeper.metrics.certificate_lifetime.get() > 0);
}

#[test]
fn renewal_is_due_at_two_thirds_or_a_little_earlier() {
    let begin = SystemTime::UNIX_EPOCH;
    let end = begin + Duration::from_secs(3000);
    let due = |draw| renewal_time(begin, end, draw).duration_since(begin).unwrap().as_secs_f64().round();
    assert_eq!((due(0.0), due(1.0)), (2000.0, 1850.0));
}

#[test]
fn tokens_are_read_strictly_and_shown_without_the_secret() {
    let token = EnrolmentToken::parse(" abc.s3cret\n").unwrap();
    assert_eq!(token.bearer(), "Bearer abc.s3cret");
    assert!(!format!("{token:?}").contains("s3cret"));
    for bad in ["", "abc", "abc.", ".secret", "a b.c", "a.b.c", "a.b\r\nx: y"] {
        assert!(EnrolmentToken::parse(bad).is_none(), "{bad:?}");
    }
}

#[test]
fn a_plain_agent_is_not_one_of_a_cluster_by_oversight() {
    let authority = CertificateAuthority::create("hub").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let key = AgentKey::generate().unwrap();
    let identity = "spiffe://cellway.local/cluster/prod-hz/agent/a1".parse().unwrap();
    let certificate = authority.sign_agent(&key.certificate_request().unwrap(), &identity, HOUR).unwrap();
    fs::write(at("crt"), certificate).unwrap();
    fs::write(at("key"), key.to_pem()).unwrap();
    fs::write(at("ca"), authority.certificate_pem()).unwrap();
    let load = |cluster: Option<&str>, agent_id: Option<&str>| {
        let config = IdentityConfig::Files {
            certificate: at("crt"),
            key: at("key"),
            ca: at("ca"),
            cluster: cluster.map(|name| name.parse().unwrap()),
            agent_id: agent_id.map(str::to_owned),
        };
        let client = CertificateClient { egress_proxy: None, server_name: None };
        let (_, servers) = watch::channel(vec![]);
        let keeper = IdentityKeeper::new(config.clone(), client, servers, Metrics::default());
        let credentials = keeper.load()?.unwrap();
        check_plain(&config, &credentials)?;
        Ok::<_, IdentityError>(credentials)
    };
    assert_eq!(load(Some("prod-hz"), None).unwrap().agent_id, "a1");
    assert!(matches!(load(None, None), Err(IdentityError::ClusterNotNamed(_))));
    assert!(matches!(load(Some("other"), None), Err(IdentityError::OtherCluster { .. })));
    assert!(matches!(load(Some("prod-hz"), Some("a2")), Err(IdentityError::OtherAgent { .. })));

    // A konnectivity certificate names nobody, and any id may be claimed.
    let plain = authority.issue_client("agent", &[], HOUR).unwrap();
    fs::write(at("crt"), plain.certificate_pem).unwrap();
    fs::write(at("key"), plain.key_pem).unwrap();
    let credentials = load(None, Some("node-1")).unwrap();
    assert_eq!((credentials.cluster.as_str(), credentials.agent_id.as_str()), ("", "node-1"));
}
