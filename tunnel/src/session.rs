//! An established carrier, whichever it is, and the attached tunnel on top of it that both sides share.

use std::{sync::Arc, time::Duration};

use proto::tunnel::v1;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use crate::{
    address::Target,
    connection::Connection,
    control::{self, COMMAND_QUEUE, Command, Control, Shared, Side},
    error::{CloseReason, DialError, TunnelError},
    h2,
    hello::Carrier,
    limits::Limits,
    quic::QuicLink,
    table::{ConnectionInfo, TunnelStats},
};

/// A peer that has not answered for so long is asked for a sign of life, and has as long again to give one: on the other side of
/// the world, and with packets lost, it does.
const SILENCE: Duration = Duration::from_secs(1);

/// A carrier that is up.
#[derive(Clone)]
pub(crate) enum Session {
    H2(Arc<h2::Link>),
    Quic(Arc<QuicLink>),
}

/// A tunnel that is attached: its carrier, its control stream, its tasks. Dropping it closes the tunnel.
pub(crate) struct Attached {
    pub(crate) session: Session,
    pub(crate) shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    /// Ends by itself once the session is closed, a second later at most.
    driver: Option<AbortOnDropHandle<()>>,
    _control: AbortOnDropHandle<()>,
}

// === impl Session ===

impl Session {
    pub(crate) fn carrier(&self) -> Carrier {
        match self {
            Self::H2(_) => Carrier::H2,
            Self::Quic(_) => Carrier::Quic,
        }
    }

    pub(crate) async fn open_control(&self) -> Result<Connection, TunnelError> {
        match self {
            Self::H2(link) => {
                let refused = |error: DialError| {
                    TunnelError::Protocol(format!("the control stream was refused: {error}"))
                };
                let (connection, answered) = link.open_control().map_err(refused)?;
                answered.await.map_err(|_| TunnelError::Closed("the attachment"))?.map_err(refused)?;
                Ok(connection.into())
            }
            Self::Quic(link) => link.open_control().await.map(Connection::from),
        }
    }

    pub(crate) async fn dial(&self, target: &Target, timeout: Duration) -> Result<Connection, DialError> {
        match self {
            Self::H2(link) => link.dial(target, timeout).await.map(Connection::from),
            Self::Quic(link) => link.dial(target, timeout).await.map(Connection::from),
        }
    }

    /// Ends the carrier and everything on it. The first reason counts.
    pub(crate) fn close(&self, reason: CloseReason) {
        match self {
            Self::H2(link) => link.close(reason),
            Self::Quic(link) => link.close(reason),
        }
    }

    pub(crate) fn closed(&self) -> watch::Receiver<Option<CloseReason>> {
        match self {
            Self::H2(link) => link.closed(),
            Self::Quic(link) => link.closed(),
        }
    }

    /// Waits for the end. Holds nothing of the session.
    pub(crate) fn ended(&self) -> impl Future<Output = CloseReason> + Send + use<> {
        let mut closed = self.closed();
        async move {
            match closed.wait_for(Option::is_some).await {
                Ok(reason) => reason.clone().unwrap_or(CloseReason::KeepAlive),
                Err(_) => CloseReason::Lost("the tunnel's task ended".to_owned()),
            }
        }
    }

    /// Takes a measured round trip in. QUIC measures its own.
    pub(crate) fn observe_round_trip(&self, took: Duration) {
        match self {
            Self::H2(link) => link.observe_round_trip(took),
            Self::Quic(_) => {}
        }
    }

    /// How long nothing was heard. QUIC has an idle timer of its own and always answers zero.
    pub(crate) fn silence(&self) -> Duration {
        match self {
            Self::H2(link) => link.silence(),
            Self::Quic(_) => Duration::ZERO,
        }
    }

    /// How often anything was heard.
    fn heard(&self) -> u64 {
        match self {
            Self::H2(link) => link.reads(),
            Self::Quic(link) => link.packets(),
        }
    }

    pub(crate) fn connections(&self) -> Vec<ConnectionInfo> {
        match self {
            Self::H2(link) => link.table.list(),
            Self::Quic(link) => link.table.list(),
        }
    }

    pub(crate) fn stats(&self) -> TunnelStats {
        match self {
            Self::H2(link) => link.table.stats(link.promised()),
            Self::Quic(link) => link.table.stats(link.promised()),
        }
    }

    /// What this side counts, for the other one to see.
    pub(crate) fn statistics(&self) -> v1::Statistics {
        let (used, limit) = match self {
            Self::H2(link) => link.memory(),
            Self::Quic(link) => link.memory(),
        };
        let stats = self.stats();
        v1::Statistics {
            connections: stats.connections as u64,
            dials: stats.dials,
            dial_failures: stats.dial_failures,
            memory_used: used as u64,
            memory_limit: limit as u64,
            ..v1::Statistics::default()
        }
    }

    pub(crate) fn open_count(&self) -> usize {
        match self {
            Self::H2(link) => link.table.len(),
            Self::Quic(link) => link.table.len(),
        }
    }

    pub(crate) fn count_dial(&self, failed: bool) {
        use std::sync::atomic::Ordering::Relaxed;
        let table = match self {
            Self::H2(link) => &link.table,
            Self::Quic(link) => &link.table,
        };
        table.dials.fetch_add(1, Relaxed);
        if failed {
            table.dial_failures.fetch_add(1, Relaxed);
        }
    }
}

// === impl Attached ===

impl Attached {
    /// Takes over a tunnel whose hellos are exchanged. `driver` is the carrier's task, `tls` what an agent dials with.
    pub(crate) fn new<S: Side>(
        session: Session,
        driver: AbortOnDropHandle<()>,
        control: Control,
        servers: Vec<String>,
        limits: Limits,
        tls: Option<tls::ClientTls>,
    ) -> Self {
        let shared = Shared::new(servers);
        let (commands, receiver) = mpsc::channel(COMMAND_QUEUE);
        let task = control::run::<S>(control, session.clone(), shared.clone(), receiver, limits, tls);
        let task = AbortOnDropHandle::new(tokio::spawn(task.in_current_span()));
        Self { session, shared, commands, driver: Some(driver), _control: task }
    }

    /// Asks the control task for something; when it cannot take it, the tunnel is ending anyway or it is flooded.
    pub(crate) fn command(&self, command: Command) {
        if self.commands.try_send(command).is_err() && self.session.closed().borrow().is_none() {
            tracing::warn!("the tunnel's control task is overloaded; a command was dropped");
        }
    }

    /// Measures a round trip on the control stream.
    pub(crate) async fn ping(&self) -> Result<Duration, TunnelError> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(Command::Ping(answer)).await.map_err(|_| TunnelError::Closed("the ping"))?;
        answered.await.map_err(|_| TunnelError::Closed("the ping"))
    }

    /// Resolves when the peer gives no sign of life, although it was asked for one.
    pub(crate) async fn falls_silent(&self) {
        loop {
            tokio::time::sleep(SILENCE).await;
            let heard = self.session.heard();
            self.shared.sign_wanted.notify_one();
            tokio::time::sleep(SILENCE).await;
            if self.session.heard() == heard {
                return;
            }
        }
    }

    pub(crate) async fn closed(&self) -> CloseReason {
        self.session.ended().await
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.session.close(CloseReason::Local("nobody holds the tunnel any more".to_owned()));
        // It lets the peer read to the end: stopped now, the socket would close on unread bytes and reset.
        if let Some(driver) = self.driver.take() {
            drop(driver.detach());
        }
    }
}
