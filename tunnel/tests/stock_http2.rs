//! The HTTP/2 carrier against a stock HTTP/2 implementation in either role: what we write is HTTP/2, and what a
//! general peer writes (indexed and compressed headers, its own settings and frame sizes) is understood.

#![allow(clippy::unwrap_used, clippy::print_stdout)] // a helper that fails fails the test; what was not run is said

mod support;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::{client, server};
use prost::Message;
use proto::tunnel::v1;
use support::{Identities, LONG, pattern};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tunnel::{CarrierChoice, DialError, Limits, Target};

const ALPN: &[u8] = b"cellway/1";

fn framed(message: &impl Message) -> Bytes {
    let mut bytes = BytesMut::new();
    bytes.put_u8(0);
    bytes.put_u32(message.encoded_len() as u32);
    message.encode(&mut bytes).unwrap();
    bytes.freeze()
}

/// Reads one message, which in these tests comes alone.
async fn message<M: Message + Default>(body: &mut h2::RecvStream) -> M {
    let mut bytes = BytesMut::new();
    loop {
        if bytes.len() >= 5 && bytes.len() - 5 >= (&bytes[1..5]).get_u32() as usize {
            bytes.advance(5);
            return M::decode(bytes).unwrap();
        }
        let chunk = body.data().await.unwrap().unwrap();
        body.flow_control().release_capacity(chunk.len()).unwrap();
        bytes.extend_from_slice(&chunk);
    }
}

/// Sends everything, waiting for the peer's window, and ends the stream.
async fn send_all(stream: &mut h2::SendStream<Bytes>, mut bytes: Bytes) {
    while !bytes.is_empty() {
        stream.reserve_capacity(bytes.len());
        let capacity = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await.unwrap().unwrap();
        let chunk = bytes.split_to(capacity.min(bytes.len()));
        stream.send_data(chunk, false).unwrap();
    }
    stream.send_data(Bytes::new(), true).unwrap();
}

async fn receive_all(body: &mut h2::RecvStream) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.unwrap();
        body.flow_control().release_capacity(chunk.len()).unwrap();
        all.extend_from_slice(&chunk);
    }
    all
}

#[tokio::test]
async fn our_server_with_a_stock_agent() {
    let identities = Identities::new();
    let mut listener = support::listener(&identities, Limits::default(), false).await;
    let address = listener.local_addr();
    let connector = identities.agent.connector(&[ALPN]);
    let agent = tokio::spawn(async move {
        let tcp = TcpStream::connect(address).await.unwrap();
        let tls = connector.connect("localhost".try_into().unwrap(), tcp).await.unwrap();
        let mut http = server::Builder::new()
            .initial_window_size(40_000)
            .max_frame_size(20_000)
            .max_concurrent_streams(5)
            .handshake::<_, Bytes>(tls)
            .await
            .unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        while let Some(accepted) = http.accept().await {
            // The connection ends with the test.
            let Ok((request, mut respond)) = accepted else { break };
            tasks.spawn(async move {
                if request.method() == http::Method::POST {
                    assert_eq!(request.uri().path(), "/cellway.tunnel.v1.Tunnel/Attach");
                    assert_eq!(request.headers()["content-type"], "application/grpc");
                    let response = http::Response::builder()
                        .header("content-type", "application/grpc")
                        .body(())
                        .unwrap();
                    let mut control = respond.send_response(response, false).unwrap();
                    let mut body = request.into_body();
                    let hello: v1::ServerMessage = message(&mut body).await;
                    assert!(matches!(hello.message, Some(v1::server_message::Message::Hello(_))));
                    let hello = v1::AgentHello {
                        cluster: "prod".to_owned(),
                        labels: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
                        ..Default::default()
                    };
                    let hello = v1::AgentMessage { message: Some(v1::agent_message::Message::Hello(hello)) };
                    control.send_data(framed(&hello), false).unwrap();
                    // Held open: its end would be the tunnel's.
                    receive_all(&mut body).await;
                    return;
                }
                assert_eq!(request.method(), http::Method::CONNECT);
                let authority = request.uri().authority().unwrap().to_string();
                assert!(request.headers().contains_key("cellway-timeout-ms"));
                if authority == "refused.internal:1" {
                    let response = http::Response::builder()
                        .status(502)
                        .header("cellway-error", "refused")
                        .body(())
                        .unwrap();
                    respond.send_response(response, true).unwrap();
                    return;
                }
                assert_eq!(authority, "echo.internal:7");
                let mut out = respond.send_response(http::Response::new(()), false).unwrap();
                let all = receive_all(&mut request.into_body()).await;
                send_all(&mut out, all.into()).await;
            });
        }
    });
    let server = support::attach(&mut listener).await;
    assert_eq!(server.hello().labels["a"], "b");
    let refused: Target = "refused.internal:1".parse().unwrap();
    assert_eq!(server.dial(&refused, LONG).await.unwrap_err(), DialError::Refused);
    let echo: Target = "echo.internal:7".parse().unwrap();
    for length in [0, 5, 3_000_000] {
        let mut connection = server.dial(&echo, LONG).await.unwrap();
        let bytes = pattern(length);
        connection.write_all(&bytes).await.unwrap();
        connection.shutdown().await.unwrap();
        let mut heard = Vec::new();
        connection.read_to_end(&mut heard).await.unwrap();
        assert!(heard == bytes, "{} of {length} bytes came back", heard.len());
    }
    // The peer allows five streams, the control stream among them.
    let mut held = Vec::new();
    let error = loop {
        match server.dial(&echo, Duration::from_secs(5)).await {
            Ok(connection) => held.push(connection),
            Err(error) => break error,
        }
    };
    assert_eq!((held.len(), error), (4, DialError::TooManyConnections));
    agent.abort();
}

#[tokio::test]
async fn our_agent_with_a_stock_server() {
    let identities = Identities::new();
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = identities.server.acceptor(&[ALPN]);
    let options = support::options(&identities, address, CarrierChoice::H2);
    let agent = tokio::spawn(async move {
        let mut tunnel = tunnel::connect(options).await.unwrap();
        assert_eq!(tunnel.server_hello().server_id, "stock");
        let mut tasks = tokio::task::JoinSet::new();
        while let Some(dial) = tunnel.accept().await {
            if dial.target().host == "refused.internal" {
                dial.refuse(DialError::Refused).await;
                continue;
            }
            let mut connection = dial.accept().await.unwrap();
            tasks.spawn(async move {
                let mut all = Vec::new();
                connection.read_to_end(&mut all).await.unwrap();
                connection.write_all(&all).await.unwrap();
                connection.shutdown().await.unwrap();
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
    });
    let (tcp, _) = listener.accept().await.unwrap();
    let tls = acceptor.accept(tcp).await.unwrap();
    let (mut http, connection) = client::Builder::new()
        .initial_window_size(30_000)
        .max_frame_size(17_000)
        .handshake::<_, Bytes>(tls)
        .await
        .unwrap();
    let driver = Arc::new(tokio::spawn(connection));
    let attach = http::Request::post("https://agent/cellway.tunnel.v1.Tunnel/Attach")
        .header("content-type", "application/grpc")
        .body(())
        .unwrap();
    let (response, mut control) = http.send_request(attach, false).unwrap();
    let hello = v1::ServerHello { server_id: "stock".to_owned(), ..Default::default() };
    control
        .send_data(
            framed(&v1::ServerMessage { message: Some(v1::server_message::Message::Hello(hello)) }),
            false,
        )
        .unwrap();
    let mut body = response.await.unwrap().into_body();
    let hello: v1::AgentMessage = message(&mut body).await;
    let Some(v1::agent_message::Message::Hello(hello)) = hello.message else { panic!("no hello") };
    assert_eq!(hello.cluster, "prod");

    let connect = |authority: &str| http::Request::connect(authority).body(()).unwrap();
    let (response, _stream) = http.send_request(connect("refused.internal:1"), false).unwrap();
    let response = response.await.unwrap();
    assert_eq!(
        (response.status().as_u16(), response.headers()["cellway-error"].as_bytes()),
        (502, &b"refused"[..])
    );
    for length in [5, 2_000_000] {
        let (response, mut stream) = http.send_request(connect("echo.internal:7"), false).unwrap();
        let response = response.await.unwrap();
        assert_eq!(response.status(), 200);
        let bytes = Bytes::from(pattern(length));
        send_all(&mut stream, bytes.clone()).await;
        let heard = receive_all(&mut response.into_body()).await;
        assert!(heard == bytes, "{} of {length} bytes came back", heard.len());
    }
    // A request that is neither is refused without harm to the rest.
    let (response, _stream) =
        http.send_request(http::Request::get("https://agent/").body(()).unwrap(), true).unwrap();
    assert!(response.await.is_err());
    let (response, _stream) = http.send_request(connect("refused.internal:1"), false).unwrap();
    assert_eq!(response.await.unwrap().status(), 502);
    drop(http);
    driver.abort();
    tokio::time::timeout(LONG, agent).await.unwrap().unwrap();
}
