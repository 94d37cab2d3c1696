//! Servers to talk to, ours and etcd, and clients of both.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use federation_store::etcd::{EtcdConfig, EtcdServer, ListenUrl, Listener};
use federation_store::{Compaction, Store, StoreConfig};
use proto::etcd::etcdserverpb::{
    ResponseHeader, WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse,
    cluster_client::ClusterClient, kv_client::KvClient, lease_client::LeaseClient,
    maintenance_client::MaintenanceClient, watch_client::WatchClient, watch_request::RequestUnion,
};
use proto::etcd::mvccpb;
use service::drain::{self, DrainSignal};
use test_support::process::Process;
use test_support::{TestDir, free_port, tools, wait_until};
use tls::{ClientTls, ServerTls};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

/// How long a certificate of a test is good.
pub(crate) const DAY: Duration = Duration::from_secs(86_400);

/// Long enough for a loaded machine; a test that gets here has failed.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// A server that ends with the value.
pub(crate) struct Server {
    pub(crate) name: &'static str,
    pub(crate) url: String,
    /// Ours, for looking behind the API.
    pub(crate) store: Option<Store>,
    _tasks: JoinSet<()>,
    _drain: Option<(DrainSignal, EtcdServer)>,
    _process: Option<Process>,
    _dir: TestDir,
}

/// All services of a server.
#[derive(Clone)]
pub(crate) struct Clients {
    pub(crate) kv: KvClient<Channel>,
    pub(crate) watch: WatchClient<Channel>,
    pub(crate) lease: LeaseClient<Channel>,
    pub(crate) cluster: ClusterClient<Channel>,
    pub(crate) maintenance: MaintenanceClient<Channel>,
}

/// A stream of watches.
pub(crate) struct Watching {
    client: WatchClient<Channel>,
    requests: mpsc::Sender<WatchRequest>,
    /// Until the first response is asked for: etcd says nothing at all before it has a request.
    unread: Option<mpsc::Receiver<WatchRequest>>,
    responses: Option<Streaming<WatchResponse>>,
}

/// Our server over SQLite.
pub(crate) async fn ours() -> Server {
    ours_with(EtcdConfig { progress_notify_interval: Duration::from_millis(200), ..EtcdConfig::default() })
        .await
}

pub(crate) async fn ours_with(config: EtcdConfig) -> Server {
    ours_behind(config, None).await
}

/// Our server, with `tls` on an https URL.
pub(crate) async fn ours_behind(config: EtcdConfig, tls: Option<&ServerTls>) -> Server {
    let dir = TestDir::new("etcd").unwrap();
    let config_of_store =
        StoreConfig { compaction: Compaction::Manual, ..StoreConfig::new(dir.join("store.db")) };
    let store = Store::open(config_of_store).await.unwrap();
    let server = EtcdServer::new(store.clone(), config);
    let url = if tls.is_some() { "https://127.0.0.1:0" } else { "http://127.0.0.1:0" };
    let url: ListenUrl = url.parse().unwrap();
    let listener = Listener::bind(&url, tls).await.unwrap();
    let url = listener.url();
    let (drain, watch) = drain::channel();
    let mut tasks = JoinSet::new();
    tasks.spawn(listener.serve(server.router(), watch));
    Server {
        name: "cellway",
        url,
        store: Some(store),
        _tasks: tasks,
        _drain: Some((drain, server)),
        _process: None,
        _dir: dir,
    }
}

/// A real etcd, or why there is none.
pub(crate) async fn etcd() -> Result<Server, tools::Missing> {
    let assets = tools::kubebuilder_assets()?;
    let dir = TestDir::new("real-etcd").unwrap();
    let (process, url) = start_etcd(&assets, dir.path()).await;
    Ok(Server {
        name: "etcd",
        url,
        store: None,
        _tasks: JoinSet::new(),
        _drain: None,
        _process: Some(process),
        _dir: dir,
    })
}

async fn start_etcd(assets: &Path, dir: &Path) -> (Process, String) {
    let url = format!("http://127.0.0.1:{}", free_port().unwrap());
    let peer = format!("http://127.0.0.1:{}", free_port().unwrap());
    let mut command = tokio::process::Command::new(assets.join("etcd"));
    command.arg("--data-dir").arg(dir.join("data")).args(["--log-level=error", "--unsafe-no-fsync"]);
    command.args([
        format!("--listen-client-urls={url}"),
        format!("--advertise-client-urls={url}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
        "--watch-progress-notify-interval=200ms".to_owned(),
    ]);
    let process = Process::spawn("etcd", command, &dir.join("etcd.log")).unwrap();
    let mut kv = KvClient::new(Endpoint::from_shared(url.clone()).unwrap().connect_lazy());
    wait_until(|| answers(kv.clone()), LONG, "etcd to answer").await.unwrap();
    kv.put(proto::etcd::etcdserverpb::PutRequest::default()).await.unwrap_err();
    (process, url)
}

async fn answers(mut kv: KvClient<Channel>) -> Result<(), tonic::Status> {
    let request = proto::etcd::etcdserverpb::RangeRequest { key: "x".into(), ..Default::default() };
    kv.range(request).await.map(drop)
}

// === impl Server ===

impl Server {
    pub(crate) async fn clients(&self) -> Clients {
        clients(Endpoint::from_shared(self.url.clone()).unwrap().connect().await.unwrap())
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.url.rsplit_once('/').unwrap().1.parse().unwrap()
    }
}

pub(crate) fn clients(channel: Channel) -> Clients {
    let large = 64 << 20;
    Clients {
        kv: KvClient::new(channel.clone()).max_decoding_message_size(large),
        watch: WatchClient::new(channel.clone()).max_decoding_message_size(large),
        lease: LeaseClient::new(channel.clone()),
        cluster: ClusterClient::new(channel.clone()),
        maintenance: MaintenanceClient::new(channel),
    }
}

// === impl Clients ===

impl Clients {
    pub(crate) fn watching(&self) -> Watching {
        let (requests, receiver) = mpsc::channel(64);
        Watching { client: self.watch.clone(), requests, unread: Some(receiver), responses: None }
    }

    /// All events of a watch up to now, as the server tells them, grouped by response, and how it ended.
    pub(crate) async fn events(&self, request: WatchCreateRequest) -> (Vec<mvccpb::Event>, WatchResponse) {
        let mut watching = self.watching();
        let created = watching.create(request.clone()).await;
        assert!(created.created, "{created:?}");
        let mut events = Vec::new();
        if created.canceled {
            return (events, created);
        }
        let begun = std::time::Instant::now();
        loop {
            assert!(begun.elapsed() < LONG, "no progress of {request:?}, {} events so far", events.len());
            // A server may pass over a request for progress while it is still busy.
            let progress = RequestUnion::ProgressRequest(WatchProgressRequest {});
            watching.send(progress).await;
            while let Ok(response) = tokio::time::timeout(Duration::from_millis(100), watching.next()).await {
                if response.canceled || response.watch_id == -1 {
                    return (events, response);
                }
                events.extend(response.events);
            }
        }
    }
}

// === impl Watching ===

impl Watching {
    pub(crate) async fn send(&self, request: RequestUnion) {
        self.requests.send(WatchRequest { request_union: Some(request) }).await.unwrap();
    }

    pub(crate) async fn create(&mut self, request: WatchCreateRequest) -> WatchResponse {
        self.send(RequestUnion::CreateRequest(request)).await;
        self.next().await
    }

    pub(crate) async fn next(&mut self) -> WatchResponse {
        if let Some(requests) = self.unread.take() {
            let requests = ReceiverStream::new(requests);
            self.responses = Some(self.client.watch(requests).await.unwrap().into_inner());
        }
        let responses = self.responses.as_mut().unwrap();
        tokio::time::timeout(LONG, responses.message()).await.unwrap().unwrap().unwrap()
    }
}

/// A page over a connection, TLS or not.
pub(crate) async fn page<S>(mut stream: S, path: &str) -> std::io::Result<String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream
        .write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes())
        .await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

/// The page `/health` over TLS, with or without a certificate.
pub(crate) async fn secure_page(
    ca: &str,
    identity: Option<(&str, &str)>,
    address: SocketAddr,
) -> std::io::Result<String> {
    let tls = ClientTls::from_pem(ca, identity).unwrap();
    let name = tls::ServerName::try_from("127.0.0.1").unwrap();
    let stream = TcpStream::connect(address).await?;
    page(tls.connector(&[b"http/1.1"]).connect(name, stream).await?, "/health").await
}

/// Whose answer it is differs; when it was given must not.
pub(crate) fn revision(header: &Option<ResponseHeader>) -> i64 {
    header.as_ref().map_or(-1, |header| header.revision)
}
