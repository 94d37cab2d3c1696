//! A service inside a member for the transfers: sends, checks or echoes what it is told to.
//!
//! `e2e-target ADDRESS` listens there. A connection begins with one line: `down SEED LENGTH` (it sends that stream and
//! ends), `up SEED LENGTH` (it reads that stream to its end and answers `ok` or what was wrong), or `echo`.

use std::{io, net::SocketAddr};

use anyhow::{Context as _, Result, bail};
use test_support::stream::{Checker, Stream};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

/// The first line is short; anything else is not for this service.
const MAX_LINE: u64 = 100;

#[tokio::main]
async fn main() -> Result<()> {
    let address: SocketAddr = std::env::args().nth(1).context("usage: e2e-target ADDRESS")?.parse()?;
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    eprintln!("listening on {}", listener.local_addr()?);
    let mut clients = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (client, from) = accepted?;
                clients.spawn(async move {
                    match serve(client).await {
                        Ok(done) => eprintln!("{from}: {done}"),
                        Err(error) => eprintln!("{from}: {error:#}"),
                    }
                });
            }
            Some(_) = clients.join_next(), if !clients.is_empty() => {}
        }
    }
}

async fn serve(client: TcpStream) -> Result<String> {
    client.set_nodelay(true)?;
    let (read, mut write) = client.into_split();
    let mut read = BufReader::with_capacity(256 * 1024, read);
    let mut line = String::new();
    (&mut read).take(MAX_LINE).read_line(&mut line).await?;
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        ["down", seed, length] => {
            let mut stream = Stream::new(seed.parse()?, length.parse()?);
            while let Some(piece) = stream.next_piece() {
                write.write_all(&piece).await?;
            }
            write.shutdown().await?;
            // The client's end, or its reset, says that it has seen everything.
            let mut rest = [0; 64];
            while read.read(&mut rest).await? > 0 {}
        }
        ["up", seed, length] => {
            let mut checker = Checker::new(seed.parse()?, length.parse()?);
            let verdict = loop {
                let bytes = read.fill_buf().await?;
                if bytes.is_empty() {
                    break if checker.complete() {
                        "ok".to_owned()
                    } else {
                        format!("it ended after {} bytes", checker.seen())
                    };
                }
                let count = bytes.len();
                if let Err(problem) = checker.take(bytes) {
                    break problem;
                }
                read.consume(count);
            };
            write.write_all(format!("{verdict}\n").as_bytes()).await?;
            write.shutdown().await?;
            return Ok(format!("{} {verdict}", line.trim()));
        }
        ["echo"] => {
            tokio::io::copy_buf(&mut read, &mut write).await?;
            write.shutdown().await?;
        }
        _ => bail!(io::Error::new(io::ErrorKind::InvalidData, format!("an odd first line: {line:?}"))),
    }
    Ok(format!("{} done", line.trim()))
}
