//! Reloading, versions and trust of both handles.

use std::{fs, io, time::SystemTime};

use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio_rustls::TlsConnector;

use super::*;
use crate::{
    AgentKey, CertificateAuthority, IssuedCertificate, agent_identity, certificate::CaHash, client, server,
    user_of,
};

const HOUR: Duration = Duration::from_secs(3600);

fn authority() -> CertificateAuthority {
    CertificateAuthority::create("test hub").unwrap()
}

fn hub_names() -> Vec<String> {
    vec!["hub.example".to_owned(), "192.0.2.1".to_owned()]
}

fn server(authority: &CertificateAuthority, issued: &IssuedCertificate, auth: ClientAuth) -> ServerTls {
    let ca = Some(authority.certificate_pem());
    ServerTls::from_pem(&issued.certificate_pem, &issued.key_pem, ca, auth).unwrap()
}

/// A handshake and one byte each way (in TLS 1.3 the client learns of a refused certificate only when it reads).
async fn connect(
    server: &ServerTls,
    client: &ClientTls,
    name: &str,
) -> io::Result<(client::TlsStream<DuplexStream>, server::TlsStream<DuplexStream>)> {
    let (near, far) = tokio::io::duplex(64 << 10);
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let accept = async {
        let mut stream = server.acceptor(&[b"cellway/1"]).accept(far).await?;
        stream.write_all(b"x").await?;
        stream.read_u8().await?;
        io::Result::Ok(stream)
    };
    let connect = async {
        let mut stream = client.connector(&[b"cellway/1"]).connect(name, near).await?;
        stream.read_u8().await?;
        stream.write_all(b"x").await?;
        io::Result::Ok(stream)
    };
    let (accepted, connected) = tokio::join!(accept, connect);
    Ok((connected?, accepted?))
}

#[tokio::test]
async fn an_agent_and_a_server_know_each_other() {
    let authority = authority();
    let issued = authority.issue_server(&hub_names(), HOUR).unwrap();
    let server = self::server(&authority, &issued, ClientAuth::Required);
    let identity = "spiffe://cellway.local/cluster/a/agent/1".parse().unwrap();
    let key = AgentKey::generate().unwrap();
    let certificate = authority.sign_agent(&key.certificate_request().unwrap(), &identity, HOUR).unwrap();
    let client =
        ClientTls::from_pem(authority.certificate_pem(), Some((&certificate, &key.to_pem()))).unwrap();
    for name in ["hub.example", "192.0.2.1"] {
        let (near, far) = connect(&server, &client, name).await.unwrap();
        assert_eq!(near.get_ref().1.alpn_protocol(), Some(&b"cellway/1"[..]));
        assert_eq!(near.get_ref().1.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
        let suite = near.get_ref().1.negotiated_cipher_suite().unwrap();
        assert_eq!(suite.suite(), CipherSuite::TLS13_AES_128_GCM_SHA256);
        let presented = far.get_ref().1.peer_certificates().unwrap();
        assert_eq!(agent_identity(&presented[0]).unwrap(), identity);
    }
    connect(&server, &client, "other.example").await.unwrap_err();
    // Without a certificate, and with one of another authority.
    let nobody = ClientTls::from_pem(authority.certificate_pem(), None).unwrap();
    connect(&server, &nobody, "hub.example").await.unwrap_err();
    let foreign = self::authority().sign_agent(&key.certificate_request().unwrap(), &identity, HOUR).unwrap();
    let foreign = ClientTls::from_pem(authority.certificate_pem(), Some((&foreign, &key.to_pem()))).unwrap();
    connect(&server, &foreign, "hub.example").await.unwrap_err();
    // Optional: none is accepted, a bad one is not.
    let server = self::server(&authority, &issued, ClientAuth::Optional);
    let (_, far) = connect(&server, &nobody, "hub.example").await.unwrap();
    assert!(far.get_ref().1.peer_certificates().is_none());
    connect(&server, &foreign, "hub.example").await.unwrap_err();
}

#[tokio::test]
async fn an_expired_certificate_is_refused_on_either_side() {
    let authority = authority();
    let past = SystemTime::now() - 10 * HOUR;
    let good = authority.issue_server(&hub_names(), HOUR).unwrap();
    let old = authority.issue_server_at(&hub_names(), HOUR, past).unwrap();
    let client = ClientTls::from_pem(authority.certificate_pem(), None).unwrap();
    let server = self::server(&authority, &old, ClientAuth::None);
    connect(&server, &client, "hub.example").await.unwrap_err();

    let old = authority.issue_client_at("user", &[], HOUR, past).unwrap();
    let identity = Some((old.certificate_pem.as_str(), old.key_pem.as_str()));
    let client = ClientTls::from_pem(authority.certificate_pem(), identity).unwrap();
    let server = self::server(&authority, &good, ClientAuth::Required);
    connect(&server, &client, "hub.example").await.unwrap_err();
}

#[tokio::test]
async fn a_hash_pins_the_authority_and_nothing_less() {
    let authority = authority();
    let hash = authority.public_key_hash();
    assert_eq!(hash.to_string().parse::<CaHash>().unwrap(), hash);
    let issued = authority.issue_server(&hub_names(), HOUR).unwrap();
    let server = self::server(&authority, &issued, ClientAuth::None);
    let pinned = ClientTls::with_ca_hash(hash, None).unwrap();
    connect(&server, &pinned, "hub.example").await.unwrap();
    connect(&server, &pinned, "other.example").await.unwrap_err();

    let wrong = ClientTls::with_ca_hash(self::authority().public_key_hash(), None).unwrap();
    connect(&server, &wrong, "hub.example").await.unwrap_err();

    // An impostor adds the true CA's certificate, which is public, to a chain of its own.
    let impostor = self::authority();
    let forged = impostor.issue_server(&hub_names(), HOUR).unwrap();
    let chain = format!("{}{}", forged.certificate_pem, authority.certificate_pem());
    let server = ServerTls::from_pem(&chain, &forged.key_pem, None, ClientAuth::None).unwrap();
    connect(&server, &pinned, "hub.example").await.unwrap_err();

    let past = SystemTime::now() - 10 * HOUR;
    let old = authority.issue_server_at(&hub_names(), HOUR, past).unwrap();
    let server = self::server(&authority, &old, ClientAuth::None);
    connect(&server, &pinned, "hub.example").await.unwrap_err();

    for bad in ["", "sha256:", "sha256:zz", "md5:00", &format!("sha256:{}", "0".repeat(63))] {
        assert!(bad.parse::<CaHash>().is_err(), "{bad}");
    }
}

#[tokio::test]
async fn a_reload_takes_the_new_files_and_only_good_ones() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let authority = authority();
    let write = |issued: &IssuedCertificate| {
        fs::write(at("crt"), &issued.certificate_pem).unwrap();
        fs::write(at("key"), &issued.key_pem).unwrap();
    };
    write(&authority.issue_server(&["one.example".to_owned()], HOUR).unwrap());
    fs::write(at("ca"), authority.certificate_pem()).unwrap();
    let server = ServerTls::from_files(at("crt"), at("key"), None, ClientAuth::None).unwrap();
    let client = ClientTls::from_files(at("ca"), None, None).unwrap();
    let before = server.config(&[b"a"]);
    assert!(Arc::ptr_eq(&before, &server.config(&[b"a"])));
    assert!(!server.reload().unwrap());
    assert!(Arc::ptr_eq(&before, &server.config(&[b"a"])), "nothing was new");
    let established = connect(&server, &client, "one.example").await.unwrap();

    let two = authority.issue_server(&["two.example".to_owned()], HOUR).unwrap();
    write(&two);
    assert!(server.reload().unwrap());
    assert!(!Arc::ptr_eq(&before, &server.config(&[b"a"])));
    connect(&server, &client, "two.example").await.unwrap();
    connect(&server, &client, "one.example").await.unwrap_err();
    let (mut near, mut far) = established;
    near.write_all(b"y").await.unwrap();
    assert_eq!(far.read_u8().await.unwrap(), b'y');

    // The certificate has been replaced, the key not yet; then garbage; then nothing at all.
    let three = authority.issue_server(&["three.example".to_owned()], HOUR).unwrap();
    fs::write(at("crt"), &three.certificate_pem).unwrap();
    assert!(matches!(server.reload(), Err(TlsError::Identity { .. })));
    fs::write(at("crt"), "garbage").unwrap();
    assert!(matches!(server.reload(), Err(TlsError::Certificates { .. })));
    fs::remove_file(at("key")).unwrap();
    assert!(matches!(server.reload(), Err(TlsError::File(_))));
    connect(&server, &client, "two.example").await.unwrap();
    write(&three);
    assert!(server.reload().unwrap());
    connect(&server, &client, "three.example").await.unwrap();
}

#[tokio::test]
async fn watched_files_are_taken_up() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let authority = authority();
    let write = |user: &str| {
        let issued = authority.issue_client(user, &[], HOUR).unwrap();
        fs::write(at("crt"), &issued.certificate_pem).unwrap();
        fs::write(at("key"), &issued.key_pem).unwrap();
    };
    fs::write(at("ca"), authority.certificate_pem()).unwrap();
    write("one");
    let client = ClientTls::from_files(at("ca"), Some(at("crt")), Some(at("key"))).unwrap();
    let user = |client: &ClientTls| user_of(&client.certificate().unwrap()).unwrap().0;
    assert_eq!(user(&client), "one");
    write("two");
    let watch = client.clone().watch_files(Duration::from_millis(5));
    let seen = async {
        while user(&client) != "two" {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), async {
        tokio::select! { () = watch => {}, () = seen => {} }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn older_versions_only_where_allowed() {
    let authority = authority();
    let issued = authority.issue_server(&hub_names(), HOUR).unwrap();
    let server = self::server(&authority, &issued, ClientAuth::None);
    let mut old = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(
            roots(&Source::text("ca", ""), authority.certificate_pem().as_bytes()).unwrap(),
        )
        .with_no_client_auth();
    old.alpn_protocols = vec![b"cellway/1".to_vec()];
    let handshake = async |server: &ServerTls| {
        let (near, far) = tokio::io::duplex(64 << 10);
        let connector = TlsConnector::from(Arc::new(old.clone()));
        let name = ServerName::try_from("hub.example").unwrap();
        let acceptor = server.acceptor(&[b"cellway/1"]);
        tokio::join!(acceptor.accept(far), connector.connect(name, near)).1.map(drop)
    };
    handshake(&server).await.unwrap_err();
    let server = server.with_versions(TlsVersions::From12).unwrap();
    handshake(&server).await.unwrap();
}

#[tokio::test]
async fn a_peer_that_insists_on_256_bits_gets_them() {
    let authority = authority();
    let issued = authority.issue_server(&hub_names(), HOUR).unwrap();
    let server = self::server(&authority, &issued, ClientAuth::None);
    let mut strict = CryptoProvider::clone(&provider());
    strict.cipher_suites.retain(|suite| suite.suite() == CipherSuite::TLS13_AES_256_GCM_SHA384);
    let strict = ClientConfig::builder_with_provider(Arc::new(strict))
        .with_protocol_versions(ONLY_13)
        .unwrap()
        .with_root_certificates(
            roots(&Source::text("ca", ""), authority.certificate_pem().as_bytes()).unwrap(),
        )
        .with_no_client_auth();
    let (near, far) = tokio::io::duplex(64 << 10);
    let name = ServerName::try_from("hub.example").unwrap();
    let (acceptor, connector) = (server.acceptor(&[]), TlsConnector::from(Arc::new(strict)));
    let (accepted, connected) = tokio::join!(acceptor.accept(far), connector.connect(name, near));
    accepted.unwrap();
    let suite = connected.unwrap().get_ref().1.negotiated_cipher_suite().unwrap();
    assert_eq!(suite.suite(), CipherSuite::TLS13_AES_256_GCM_SHA384);
}

#[test]
fn what_is_missing_is_said() {
    let authority = authority();
    let issued = authority.issue_server(&hub_names(), HOUR).unwrap();
    let error = ServerTls::from_pem(&issued.certificate_pem, &issued.key_pem, None, ClientAuth::Required)
        .unwrap_err();
    assert!(matches!(error, TlsError::NoClientCa));
    let error = ClientTls::from_files("ca", Some("crt".into()), None).unwrap_err();
    assert!(matches!(error, TlsError::HalfIdentity));
    let error = ClientTls::from_files("/nonexistent/ca", None, None).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/ca"));
}

#[tokio::test]
async fn a_name_has_a_certificate_of_its_own_and_clients_come_from_two_authorities() {
    let directory = tempfile::tempdir().unwrap();
    let (own, others) = (authority(), authority());
    let at = |name: &str| directory.path().join(name);
    let write = |name: &str, issued: &IssuedCertificate| {
        fs::write(at(&format!("{name}.crt")), &issued.certificate_pem).unwrap();
        fs::write(at(&format!("{name}.key")), &issued.key_pem).unwrap();
    };
    let inner = ["inner.example".to_owned()];
    write("given", &others.issue_server(&hub_names(), HOUR).unwrap());
    write("own", &own.issue_server(&inner, HOUR).unwrap());
    fs::write(at("own-ca"), own.certificate_pem()).unwrap();
    fs::write(at("others-ca"), others.certificate_pem()).unwrap();
    let server =
        ServerTls::from_files(at("given.crt"), at("given.key"), Some(at("own-ca")), ClientAuth::Required)
            .unwrap()
            .with_named("inner.example", at("own.crt"), at("own.key"))
            .unwrap()
            .with_client_ca(at("others-ca"))
            .unwrap();
    let client = |trusts: &CertificateAuthority, of: &CertificateAuthority| {
        let issued = of.issue_client("ann", &[], HOUR).unwrap();
        let identity = Some((issued.certificate_pem.as_str(), issued.key_pem.as_str()));
        ClientTls::from_pem(trusts.certificate_pem(), identity).unwrap()
    };
    connect(&server, &client(&others, &own), "hub.example").await.unwrap();
    connect(&server, &client(&others, &others), "192.0.2.1").await.unwrap();
    connect(&server, &client(&own, &others), "inner.example").await.unwrap();
    connect(&server, &client(&own, &own), "hub.example").await.unwrap_err();
    connect(&server, &client(&own, &authority()), "inner.example").await.unwrap_err();
    let end = |pem: &str| {
        crate::certificate::validity(&crate::certificates_from_pem(pem.as_bytes()).unwrap()[0]).unwrap().1
    };
    let of = |file: &str| end(&fs::read_to_string(at(file)).unwrap());
    let ends = crate::CertificateEnds {
        served: Some(of("given.crt")),
        named: Some(of("own.crt")),
        client_cas: vec![of("own-ca"), of("others-ca")],
    };
    assert_eq!(server.ends(), ends);
    // Any of the files is followed.
    assert!(!server.reload().unwrap());
    write("own", &own.issue_server(&["other.example".to_owned()], HOUR).unwrap());
    assert!(server.reload().unwrap());
    assert_eq!(server.ends().named, Some(of("own.crt")));
    connect(&server, &client(&own, &own), "inner.example").await.unwrap_err();
    fs::write(at("others-ca"), authority().certificate_pem()).unwrap();
    assert!(server.reload().unwrap());
    connect(&server, &client(&others, &others), "hub.example").await.unwrap_err();
    connect(&server, &client(&others, &own), "hub.example").await.unwrap();
    // A CA that is broken or gone keeps no renewed certificate out, and stays itself as it was; it is said each time.
    fs::write(at("own-ca"), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    let renewed = others.issue_server(&hub_names(), HOUR).unwrap();
    write("given", &renewed);
    let failed = server.reload().unwrap_err();
    assert!(failed.to_string().contains("own-ca"), "{failed}");
    let served = crate::certificates_from_pem(renewed.certificate_pem.as_bytes()).unwrap();
    assert_eq!(server.certificate().as_ref(), served.first());
    connect(&server, &client(&others, &own), "hub.example").await.unwrap();
    fs::remove_file(at("own-ca")).unwrap();
    assert!(matches!(server.reload(), Err(TlsError::File(_))));
    connect(&server, &client(&others, &own), "hub.example").await.unwrap();
    connect(&server, &client(&others, &authority()), "hub.example").await.unwrap_err();
    fs::write(at("own-ca"), own.certificate_pem()).unwrap();
    assert!(!server.reload().unwrap(), "it is what is in force");
    // A certificate whose key is another's changes nothing.
    fs::write(at("own.key"), others.issue_server(&inner, HOUR).unwrap().key_pem).unwrap();
    assert!(matches!(server.reload(), Err(TlsError::Identity { .. })));
}
