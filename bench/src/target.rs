//! The server at the far end of every path: echoes, sends or takes bytes, as each connection's first bytes ask.
//!
//! Echoes run on the accepting thread and bulk transfers on another one, so that a ping-pong beside busy downloads
//! measures the tunnel and not this process.

use std::{io, thread};

use anyhow::{Context, Result};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime,
    sync::mpsc,
    task::JoinSet,
};

use crate::{
    process,
    wire::{REQUEST_LEN, Request, UPLOAD_DONE},
};

/// Bulk connections waiting for the other thread; the tests open a handful.
const BULK_QUEUE: usize = 64;

/// One write of a download: large enough that system calls do not dominate, small enough to stay in the L2 cache.
const BULK_CHUNK: usize = 256 * 1024;

/// Read size of the echo. Larger than a ping, so that a read comes back short and needs no second one to find the
/// socket empty.
const ECHO_BUFFER: usize = 16 * 1024;

/// Serves until standard input ends, which is how the parent's death is noticed. The port is the first line printed.
pub(crate) fn run() -> Result<()> {
    let (bulk, bulk_connections) = mpsc::channel(BULK_QUEUE);
    let thread = thread::Builder::new().name("bulk".to_owned()).spawn(move || {
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(serve_bulk(bulk_connections));
        io::Result::Ok(())
    });
    thread.context("failed to start the thread for bulk transfers")?;
    let runtime =
        runtime::Builder::new_current_thread().enable_all().build().context("failed to start a runtime")?;
    process::run_helper(runtime, async {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("failed to bind a loopback port")?;
        process::say(&Ready { port: listener.local_addr()?.port() })?;
        accept(listener, bulk).await
    })
}

/// The line that a target prints when it listens.
#[derive(serde::Serialize, serde::Deserialize)]
pub(crate) struct Ready {
    pub(crate) port: u16,
}

async fn accept(listener: TcpListener, bulk: mpsc::Sender<(std::net::TcpStream, Request)>) -> Result<()> {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, _) = accepted.context("failed to accept a connection")?;
                connections.spawn(serve(stream, bulk.clone()));
            }
            // A client that goes away in the middle is how most of the connections end: nothing to say.
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve(mut stream: TcpStream, bulk: mpsc::Sender<(std::net::TcpStream, Request)>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut request = [0; REQUEST_LEN];
    stream.read_exact(&mut request).await?;
    match Request::decode(request) {
        Some(Request::Echo) => echo(stream).await,
        Some(request) => {
            bulk.send((stream.into_std()?, request)).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
        }
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

async fn echo(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; ECHO_BUFFER];
    loop {
        match stream.read(&mut buffer).await? {
            0 => return Ok(()),
            length => stream.write_all(&buffer[..length]).await?,
        }
    }
}

async fn serve_bulk(mut incoming: mpsc::Receiver<(std::net::TcpStream, Request)>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            connection = incoming.recv() => match connection {
                Some((stream, request)) => {
                    connections.spawn(transfer(stream, request));
                }
                None => return,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn transfer(stream: std::net::TcpStream, request: Request) -> io::Result<()> {
    let mut stream = TcpStream::from_std(stream)?;
    let mut buffer = vec![0x5a; BULK_CHUNK];
    match request {
        Request::Echo => echo(stream).await,
        Request::Source(mut left) => {
            while left > 0 {
                let length = left.min(BULK_CHUNK as u64) as usize;
                left -= stream.write(&buffer[..length]).await? as u64;
            }
            // Waits for the client to close, so that nothing of the end is lost to a reset.
            while stream.read(&mut buffer).await? > 0 {}
            Ok(())
        }
        Request::Sink(mut left) => {
            while left > 0 {
                let length = left.min(BULK_CHUNK as u64) as usize;
                match stream.read(&mut buffer[..length]).await? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    length => left -= length as u64,
                }
            }
            stream.write_all(&[UPLOAD_DONE]).await?;
            while stream.read(&mut buffer).await? > 0 {}
            Ok(())
        }
    }
}
