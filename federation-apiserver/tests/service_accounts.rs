//! Tokens of service accounts and of an OpenID Connect issuer, on a running server.

mod common;

use base64::Engine as _;
use common::{Answer, Server};
use federation_apiserver::{OidcConfig, Role};
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use jsonwebtoken::jwk::{Jwk, ThumbprintHash};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde_json::{Value, json};
use tokio::task::JoinSet;

const ROBOTS: &str = "/api/v1/namespaces/default/serviceaccounts";
const WHOAMI: &str = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
const REVIEWS: &str = "/apis/authentication.k8s.io/v1/tokenreviews";

async fn made(server: &Server, path: &str, body: Value) -> Value {
    let answer = server.call("POST", path, Some(&body)).await;
    assert_eq!(answer.code, 201, "{path}: {}", answer.text);
    answer.body
}

async fn whoami(server: &Server, token: &str) -> Answer {
    let bearer = format!("Bearer {token}");
    let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
    server.send_as(None, "POST", WHOAMI, &headers, "{}".into()).await
}

fn token(request: &Value) -> &str {
    request["status"]["token"].as_str().expect("a token")
}

#[tokio::test]
async fn tokens_live_as_long_as_their_account() {
    let server = Server::hub().await;
    server.until(&format!("{ROBOTS}/default"), "every namespace has an account", |a| a.code == 200).await;
    made(&server, ROBOTS, json!({"metadata": {"name": "robot"}})).await;
    let ask = json!({"spec": {"expirationSeconds": 700}});
    let request = made(&server, &format!("{ROBOTS}/robot/token"), ask).await;
    assert_eq!(request["spec"]["expirationSeconds"], 700);
    let me = whoami(&server, token(&request)).await;
    let info = &me.body["status"]["userInfo"];
    assert_eq!(info["username"], "system:serviceaccount:default:robot", "{}", me.text);
    let groups = ["system:serviceaccounts", "system:serviceaccounts:default", "system:authenticated"];
    assert_eq!(info["groups"], json!(groups));
    assert!(
        info["extra"]["authentication.kubernetes.io/credential-id"][0]
            .as_str()
            .is_some_and(|id| id.starts_with("JTI="))
    );
    // The public keys are there for whoever has a right to them, and verify the token.
    let document = server.get("/.well-known/openid-configuration").await.body;
    assert_eq!(document["issuer"], federation_apiserver::DEFAULT_ISSUER);
    assert!(document["jwks_uri"].as_str().is_some_and(|u| u.ends_with("/openid/v1/jwks")));
    let keys = server.get("/openid/v1/jwks").await.body;
    let jwk: Jwk = serde_json::from_value(keys["keys"][0].clone()).expect("a key");
    let mut validation = Validation::new(Algorithm::ES256);
    validation.set_audience(&[federation_apiserver::DEFAULT_ISSUER]);
    let key = DecodingKey::from_jwk(&jwk).expect("usable");
    let claims = jsonwebtoken::decode::<Value>(token(&request), &key, &validation).expect("valid").claims;
    assert_eq!(claims["kubernetes.io"]["serviceaccount"]["name"], "robot");
    // For another audience: not for this server, as a review says too.
    let other =
        made(&server, &format!("{ROBOTS}/robot/token"), json!({"spec": {"audiences": ["vault"]}})).await;
    assert_eq!(whoami(&server, token(&other)).await.code, 401);
    let review =
        made(&server, REVIEWS, json!({"spec": {"token": token(&other), "audiences": ["vault", "x"]}})).await;
    assert_eq!(
        (&review["status"]["authenticated"], &review["status"]["audiences"]),
        (&json!(true), &json!(["vault"]))
    );
    let review = made(&server, REVIEWS, json!({"spec": {"token": token(&other)}})).await;
    assert_eq!(review["status"].get("authenticated"), None);
    // Made anew, the account is another one.
    assert_eq!(server.call("DELETE", &format!("{ROBOTS}/robot"), None).await.code, 200);
    assert_eq!(whoami(&server, token(&request)).await.code, 401);
    made(&server, ROBOTS, json!({"metadata": {"name": "robot"}})).await;
    assert_eq!(whoami(&server, token(&request)).await.code, 401);
    server.stop().await;
}

#[tokio::test]
async fn tokens_end_with_what_they_are_bound_to() {
    let server = Server::member().await;
    server.until(&format!("{ROBOTS}/default"), "the account", |a| a.code == 200).await;
    let path = format!("{ROBOTS}/default/token");
    let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "x"}]}});
    made(&server, "/api/v1/namespaces/default/pods", pod).await;
    made(&server, "/api/v1/namespaces/default/secrets", json!({"metadata": {"name": "s"}})).await;
    let bound = |kind: &str, name: &str| json!({"spec": {"boundObjectRef": {"apiVersion": "v1", "kind": kind, "name": name}}});
    for (kind, name, plural) in [("Pod", "p", "pods"), ("Secret", "s", "secrets")] {
        let request = made(&server, &path, bound(kind, name)).await;
        let me = whoami(&server, token(&request)).await;
        assert_eq!(me.code, 201, "{}", me.text);
        if kind == "Pod" {
            assert_eq!(
                me.body["status"]["userInfo"]["extra"]["authentication.kubernetes.io/pod-name"],
                json!(["p"])
            );
        }
        let object = format!("/api/v1/namespaces/default/{plural}/{name}?gracePeriodSeconds=0");
        server.call("DELETE", &object, None).await;
        server.until(&object, "gone", |a| a.code == 404).await;
        assert_eq!(whoami(&server, token(&request)).await.code, 401, "{kind}");
    }
    for (body, code, text) in [
        (bound("Pod", "none"), 404, "pods \"none\" not found"),
        (bound("Deployment", "x"), 400, "cannot bind token to object of type v1, Kind=Deployment"),
        (json!({"spec": {"expirationSeconds": 1}}), 422, "may not specify a duration less than 10 minutes"),
        (
            json!({"spec": {"expirationSeconds": 1_u64 << 40}}),
            422,
            "may not specify a duration larger than 2^32 seconds",
        ),
    ] {
        let answer = server.call("POST", &path, Some(&body)).await;
        let message = answer.body["message"].as_str().unwrap_or_default();
        assert!(answer.code == code && message.contains(text), "{}", answer.text);
    }
    assert_eq!(server.call("POST", &format!("{ROBOTS}/none/token"), Some(&json!({}))).await.code, 404);
    server.stop().await;
}

#[tokio::test]
async fn secrets_are_filled_with_tokens() {
    let server = Server::hub().await;
    let secrets = "/api/v1/namespaces/default/secrets";
    made(&server, ROBOTS, json!({"metadata": {"name": "robot"}})).await;
    let secret = |account: &str| {
        json!({"metadata": {"name": account, "annotations": {"kubernetes.io/service-account.name": account}},
            "type": "kubernetes.io/service-account-token"})
    };
    made(&server, secrets, secret("robot")).await;
    let filled = server
        .until(&format!("{secrets}/robot"), "filled", |a| a.body["data"]["token"].is_string())
        .await
        .body;
    let decode = |key: &str| {
        let bytes =
            base64::engine::general_purpose::STANDARD.decode(filled["data"][key].as_str().expect("data"));
        String::from_utf8(bytes.expect("base64")).expect("text")
    };
    assert_eq!(decode("namespace"), "default");
    assert!(decode("ca.crt").contains("BEGIN CERTIFICATE"));
    let me = whoami(&server, &decode("token")).await;
    assert_eq!(
        me.body["status"]["userInfo"]["username"], "system:serviceaccount:default:robot",
        "{}",
        me.text
    );
    // The Secret goes with the account, the token with the Secret.
    server.call("DELETE", &format!("{ROBOTS}/robot"), None).await;
    server.until(&format!("{secrets}/robot"), "removed", |a| a.code == 404).await;
    assert_eq!(whoami(&server, &decode("token")).await.code, 401);
    made(&server, secrets, secret("nobody")).await;
    server.until(&format!("{secrets}/nobody"), "removed", |a| a.code == 404).await;
    let unnamed = json!({"metadata": {"name": "x"}, "type": "kubernetes.io/service-account-token"});
    assert_eq!(server.call("POST", secrets, Some(&unnamed)).await.code, 422);
    server.stop().await;
}

/// An issuer on loopback: its discovery document and keys over TLS.
async fn issuer(ca: &tls::CertificateAuthority, jwks: Value) -> (String, JoinSet<()>) {
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
    let url = format!("https://localhost:{}", listener.local_addr().expect("bound").port());
    let issued =
        ca.issue_server(&["localhost".into()], std::time::Duration::from_secs(3600)).expect("issued");
    let tls = tls::ServerTls::from_pem(&issued.certificate_pem, &issued.key_pem, None, tls::ClientAuth::None)
        .expect("TLS");
    let mut tasks = JoinSet::new();
    let own = url.clone();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.expect("a connection");
            let (tls, own, jwks) = (tls.clone(), own.clone(), jwks.clone());
            connections.spawn(async move {
                let Ok(stream) = tls.acceptor(&[b"http/1.1"]).accept(stream).await else { return };
                let answer =
                    hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
                        let body = match request.uri().path() {
                            "/keys" => jwks.clone(),
                            _ => json!({"issuer": own, "jwks_uri": format!("{own}/keys")}),
                        };
                        async move {
                            Ok::<_, std::convert::Infallible>(http::Response::new(Full::new(
                                bytes::Bytes::from(body.to_string()),
                            )))
                        }
                    });
                drop(
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), answer)
                        .await,
                );
            });
        }
    });
    (url, tasks)
}

#[tokio::test]
async fn users_of_an_issuer() {
    let dir = tempfile::tempdir().expect("a directory");
    let ca = tls::CertificateAuthority::create("issuer").expect("an authority");
    let ca_file = dir.path().join("ca.crt");
    std::fs::write(&ca_file, ca.certificate_pem()).expect("written");
    let key = |name: &str| {
        let issued = ca.issue_client(name, &[], std::time::Duration::from_secs(60)).expect("a key");
        EncodingKey::from_ec_pem(issued.key_pem.as_bytes()).expect("P-256")
    };
    let (good, bad) = (key("good"), key("bad"));
    let mut jwk = Jwk::from_encoding_key(&good, Algorithm::ES256).expect("a JWK");
    let id = jwk.thumbprint(ThumbprintHash::SHA256).expect("an id");
    jwk.common.key_id = Some(id.clone());
    let (url, _issuer) = issuer(&ca, json!({"keys": [jwk]})).await;
    let config = OidcConfig {
        issuer_url: url.clone(),
        client_id: "hub".into(),
        groups_claim: "groups".into(),
        username_prefix: Some("oidc:".into()),
        signing_algs: vec!["ES256".into()],
        ca_file: Some(ca_file),
        ..OidcConfig::default()
    };
    let server = Server::start(Role::Hub, |c| c.oidc = Some(config), |_| {}).await;
    let sign = |key: &EncodingKey, change: Value| {
        let mut claims =
            json!({"iss": url, "aud": "hub", "sub": "jo", "groups": ["dev"], "exp": 4_000_000_000_u64});
        for (k, v) in change.as_object().into_iter().flatten() {
            claims[k] = v.clone();
        }
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(id.clone());
        jsonwebtoken::encode(&header, &claims, key).expect("signed")
    };
    let me = whoami(&server, &sign(&good, json!({}))).await;
    assert_eq!(
        me.body["status"]["userInfo"],
        json!({"username": "oidc:jo", "groups": ["dev", "system:authenticated"]}),
        "{}",
        me.text
    );
    let wrong = [
        sign(&bad, json!({})),
        sign(&good, json!({"aud": "other"})),
        sign(&good, json!({"exp": 1000})),
        sign(&good, json!({"nbf": 4_000_000_000_u64})),
        sign(&good, json!({"iss": "https://elsewhere"})),
        sign(&good, json!({"sub": null})),
    ];
    for token in &wrong {
        assert_eq!(whoami(&server, token).await.code, 401, "{token}");
    }
    server.stop().await;
}
