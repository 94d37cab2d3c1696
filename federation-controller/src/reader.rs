//! Reads what APIs answer, bounded in bytes while it comes and in memory as it is read.
//!
//! Nothing of an answer that cannot be read goes anywhere but into a sentence of ours: a page may hold Secrets. An answer is held as
//! it came, once, and its objects are read out of it one by one ([`answers`]). What is held at a time is shared out: a member that
//! sends much has its own answers refused, and asks itself for smaller pages; only then do members wait for each other.
//!
//! Who waits holds what has come of its answer already, so all could come to wait for all. Therefore the last of the room,
//! enough for one answer of any length, is given to one answer at a time, whole: that one waits for nobody, ends within its time
//! limit, and what it held is for the next.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use federation_core::answers::{self, Malformed, Page, Unreadable};
use http::{HeaderValue, Request, Response, header};
use http_body_util::BodyExt as _;
use kube::Resource as _;
use kube::api::{ApiResource, DeleteParams, DynamicObject, GetParams, ListParams, Patch, PatchParams};
use kube::client::Body;
use kube::core::Status;
use prometheus_client::metrics::counter::Counter;
use serde::Serialize;
use serde_json::Value;
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// Longest answer of a member, and longest line of a watch: an object of the greatest size that etcd takes, were each byte of it
/// written as six. What is too large for one page of a list is asked for in smaller ones.
pub(crate) const MAX_ANSWER: usize = 16 << 20;
/// Longest answer of the hub's own API, which bounds what it keeps: a page of 500 objects of the greatest size.
const MAX_HUB_ANSWER: usize = 1 << 30;
/// Most memory that one object may take once it is read. A definition of 1 MiB takes about half of it; a list of numbers that
/// long would take a third.
pub(crate) const MAX_OBJECT: usize = 64 << 20;
/// Longest answer that says why something is refused.
const MAX_REFUSAL: usize = 64 << 10;
/// Bytes of one answer that are nobody's to give: the answers to most writes and probes fit in, and most lines of a watch.
const FREE: usize = 64 << 10;
/// Bytes of answers that are held at a time for one member: three of the longest.
const MEMBER_SHARE: usize = 48 << 20;
/// Bytes of answers that are held at a time for all members: five of them may do their worst, and the others list still.
const ALL_SHARES: usize = 256 << 20;
/// A page of a list that was too large is asked for again in so many pieces.
pub(crate) const SMALLER: u32 = 5;
/// What shares are counted in.
const UNIT: usize = 1 << 10;

/// Why an answer was not read.
#[derive(Debug, Error)]
pub(crate) enum ReadError {
    /// The server refuses, or there is no way to it.
    #[error(transparent)]
    Client(#[from] kube::Error),
    /// It began to come and did not end.
    #[error("the answer broke off")]
    BrokeOff(#[source] kube::Error),
    /// It is longer than one may be.
    #[error("the answer is longer than {} MiB", .0 >> 20)]
    TooLong(usize),
    /// So much is being read from the member already that there is no room for it.
    #[error("the member's answers together are longer than {} MiB", MEMBER_SHARE >> 20)]
    Busy,
    /// It did not come in time.
    #[error("no answer within {0:?}")]
    Late(Duration),
    /// It is something else than what was asked for.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// It is an object that cannot be read.
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
}

/// Reads the answers of one API. Clones share what they may hold.
#[derive(Clone)]
pub(crate) struct Reader {
    client: kube::Client,
    longest: usize,
    share: Option<Share>,
    unreadable: Counter,
}

/// What is held of answers, of all members.
#[derive(Debug, Clone)]
pub(crate) struct Shares {
    /// Room for whoever comes.
    all: Arc<Semaphore>,
    /// [`MAX_ANSWER`] more, for one that would have to wait.
    last: Arc<Semaphore>,
}

#[derive(Debug, Clone)]
struct Share {
    own: Arc<Semaphore>,
    shares: Shares,
}

/// Room for an answer; given back when dropped.
#[derive(Debug, Default)]
struct Room {
    share: Option<Share>,
    /// Of its member's.
    own: Option<OwnedSemaphorePermit>,
    /// Of that for all. Less than of its member's while it has the last.
    all: Option<OwnedSemaphorePermit>,
    /// The last, which is enough for all that is still to come.
    last: Option<OwnedSemaphorePermit>,
}

/// An answer as it came.
#[derive(Debug)]
struct Answer {
    text: Vec<u8>,
    _room: Room,
}

/// The lines of an answer that goes on for as long as somebody watches.
pub(crate) struct Lines {
    body: Body,
    buffer: BytesMut,
    /// So much of the buffer holds no line's end.
    searched: usize,
    /// The line that is coming is too long.
    skips: bool,
    longest: usize,
    room: Room,
}

/// A line of a watch.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line {
    Text(Bytes),
    /// One that is longer than a line may be.
    TooLong,
}

/// Objects of one type, in one namespace where they have namespaces.
pub(crate) struct Objects {
    reader: Reader,
    path: kube::core::Request,
}

// === impl ReadError ===

impl ReadError {
    /// What the server answered instead, if it did.
    pub(crate) fn status(&self) -> Option<&Status> {
        match self {
            Self::Client(kube::Error::Api(status)) => Some(status),
            _ => None,
        }
    }

    /// Whether the server says that it has no object of this name.
    pub(crate) fn says_gone(&self, name: &str) -> bool {
        self.not_found().is_some_and(|found| found == Some(name))
    }

    /// Whether the server does not know what was asked for by its path: it does not serve the type, or not just now, or it is not
    /// the server that was meant. That says nothing of any object.
    pub(crate) fn is_unserved(&self) -> bool {
        self.not_found().is_some_and(|found| found.is_none())
    }

    /// Of which object the server says that it is not there; `Some(None)`: it names none.
    fn not_found(&self) -> Option<Option<&str>> {
        let status = self.status().filter(|status| status.code == 404)?;
        let name = status.details.as_ref().map(|details| details.name.as_str());
        Some(name.filter(|name| !name.is_empty()))
    }

    /// Whether less may be answered if less is asked for.
    pub(crate) fn is_too_large(&self) -> bool {
        matches!(self, Self::TooLong(_) | Self::Busy)
    }
}

impl From<kube::core::request::Error> for ReadError {
    fn from(error: kube::core::request::Error) -> Self {
        Self::Client(kube::Error::BuildRequest(error))
    }
}

// === impl Shares ===

impl Default for Shares {
    fn default() -> Self {
        let all = Arc::new(Semaphore::new((ALL_SHARES - MAX_ANSWER) / UNIT));
        Self { all, last: Arc::new(Semaphore::new(1)) }
    }
}

#[cfg(test)]
impl Shares {
    /// Bytes that are given to nobody.
    fn left(&self) -> usize {
        self.all.available_permits() * UNIT + self.last.available_permits() * MAX_ANSWER
    }
}

// === impl Reader ===

impl Reader {
    /// Of the hub's own API.
    pub(crate) fn of_hub(client: kube::Client) -> Self {
        Self { client, longest: MAX_HUB_ANSWER, share: None, unreadable: Counter::default() }
    }

    /// Of a member; `unreadable` counts its objects that cannot be read.
    pub(crate) fn of_member(client: kube::Client, shares: &Shares, unreadable: Counter) -> Self {
        let share = Share { own: Arc::new(Semaphore::new(MEMBER_SHARE / UNIT)), shares: shares.clone() };
        Self { client, longest: MAX_ANSWER, share: Some(share), unreadable }
    }

    /// An object that is passed over is counted.
    pub(crate) fn pass_over(&self) {
        self.unreadable.inc();
    }

    /// Reads a page of a list; `take` as in [`answers::page`]. Until all of it has come none of it is read.
    pub(crate) async fn page(
        &self,
        request: Request<Vec<u8>>,
        take: impl FnMut(Result<Value, Unreadable>) -> bool,
    ) -> Result<Page, ReadError> {
        let answer = self.answer(request).await?;
        Ok(answers::page(&answer.text, MAX_OBJECT, take)?)
    }

    /// Reads a list, as `ask` asks for its pages, in smaller pages where they are too large: no more than `most`, each of which is waited for until `late`.
    /// What cannot be read is passed over; `take` says whether to go on.
    pub(crate) async fn list(
        &self,
        ask: impl Fn(&ListParams) -> Result<Request<Vec<u8>>, kube::core::request::Error>,
        mut params: ListParams,
        (most, late): (usize, Duration),
        mut take: impl FnMut(Value) -> bool,
    ) -> Result<(), ReadError> {
        for _ in 0..most {
            let mut wanted = true;
            let reading = self.page(ask(&params)?, |item| {
                match item {
                    Ok(object) => wanted = take(object),
                    Err(_) => self.pass_over(),
                }
                wanted
            });
            let page = match timeout(late, reading).await.map_err(|_| ReadError::Late(late))? {
                Err(error) if error.is_too_large() && params.limit > Some(1) => {
                    params.limit = params.limit.map(|limit| (limit / SMALLER).max(1));
                    continue;
                }
                page => page?,
            };
            if !wanted || page.more.is_empty() {
                break;
            }
            params.continue_token = Some(page.more);
        }
        Ok(())
    }

    /// Reads one object.
    pub(crate) async fn object(&self, request: Request<Vec<u8>>) -> Result<Value, ReadError> {
        let answer = self.answer(request).await?;
        Ok(answers::object(&answer.text, MAX_OBJECT).inspect_err(|_| self.pass_over())?)
    }

    /// Whether the answer is a good one, whatever it says.
    pub(crate) async fn is_well(&self, request: Request<Vec<u8>>) -> Result<(), ReadError> {
        self.answer(request).await.map(drop)
    }

    /// Begins a watch.
    pub(crate) async fn lines(&self, mut request: Request<Vec<u8>>) -> Result<Lines, ReadError> {
        // Each line of a compressed watch is compressed by itself, and clients read the first one only.
        request.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let body = self.begin(request).await?.into_body();
        Ok(Lines {
            body,
            buffer: BytesMut::new(),
            searched: 0,
            skips: false,
            longest: self.longest,
            room: Room { share: self.share.clone(), ..Room::default() },
        })
    }

    /// The objects of a type.
    pub(crate) fn objects(&self, of: &ApiResource, namespace: Option<&str>) -> Objects {
        let path = kube::core::Request::new(DynamicObject::url_path(of, namespace));
        Objects { reader: self.clone(), path }
    }

    async fn answer(&self, request: Request<Vec<u8>>) -> Result<Answer, ReadError> {
        let mut body = self.begin(request).await?.into_body();
        let mut room = Room { share: self.share.clone(), ..Room::default() };
        let mut text = Vec::new();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.map_err(ReadError::BrokeOff)?.into_data() else { continue };
            let length = text.len() + data.len();
            if length > self.longest {
                return Err(ReadError::TooLong(self.longest));
            }
            room.fit(length).await?;
            text.extend_from_slice(&data);
        }
        Ok(Answer { text, _room: room })
    }

    /// Asks; a refusal is an error.
    async fn begin(&self, request: Request<Vec<u8>>) -> Result<Response<Body>, ReadError> {
        let response = self.client.send(request.map(Body::from)).await?;
        let code = response.status();
        if !(code.is_client_error() || code.is_server_error()) {
            return Ok(response);
        }
        let mut body = response.into_body();
        let mut text = Vec::new();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.map_err(ReadError::BrokeOff)?.into_data() else { continue };
            let left = MAX_REFUSAL - text.len();
            text.extend_from_slice(&data[..data.len().min(left)]);
            if data.len() >= left {
                break;
            }
        }
        let status = serde_json::from_slice::<Status>(&text).unwrap_or_else(|_| {
            // A proxy on the way, or a path that is no object's.
            let words = String::from_utf8_lossy(&text).trim().to_owned();
            Status { code: code.as_u16(), message: words, ..Status::default() }
        });
        // What it says of itself is not what it is by.
        Err(kube::Error::Api(Box::new(Status { code: code.as_u16(), ..status })).into())
    }
}

// === impl Room ===

impl Room {
    /// Has room for so many bytes, no more than [`MAX_ANSWER`]: as many as its member has left, when there is as much left for all.
    /// Cancel-safe.
    async fn fit(&mut self, bytes: usize) -> Result<(), ReadError> {
        let Some(Share { own, shares }) = &self.share else { return Ok(()) };
        let units = bytes.saturating_sub(FREE).div_ceil(UNIT);
        shrink(&mut self.own, units);
        shrink(&mut self.all, units);
        if units == held(&self.all) {
            self.last = None;
        }
        // Of answers that are bounded.
        let lacks = |room| u32::try_from(units - held(room)).map_err(|_| ReadError::Busy);
        let (own_lacks, lacks) = (lacks(&self.own)?, lacks(&self.all)?);
        if own_lacks > 0 {
            let more = Arc::clone(own).try_acquire_many_owned(own_lacks);
            merge(&mut self.own, more.map_err(|_| ReadError::Busy)?);
        }
        if lacks > 0 && self.last.is_none() {
            tokio::select! {
                biased;
                more = Arc::clone(&shares.all).acquire_many_owned(lacks) => {
                    merge(&mut self.all, more.map_err(|_| ReadError::Busy)?);
                }
                last = Arc::clone(&shares.last).acquire_owned() => {
                    self.last = Some(last.map_err(|_| ReadError::Busy)?);
                }
            }
        }
        Ok(())
    }
}

fn held(room: &Option<OwnedSemaphorePermit>) -> usize {
    room.as_ref().map_or(0, OwnedSemaphorePermit::num_permits)
}

/// Gives back what is beyond so many units.
fn shrink(room: &mut Option<OwnedSemaphorePermit>, units: usize) {
    let beyond = held(room).saturating_sub(units);
    if beyond > 0 {
        drop(room.as_mut().and_then(|room| room.split(beyond)));
    }
}

fn merge(room: &mut Option<OwnedSemaphorePermit>, more: OwnedSemaphorePermit) {
    match room {
        Some(room) => room.merge(more),
        None => *room = Some(more),
    }
}

// === impl Lines ===

impl Lines {
    /// The next line; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Line>, ReadError> {
        loop {
            let end = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n');
            if let Some(end) = end {
                let line = self.buffer.split_to(self.searched + end + 1).freeze();
                self.searched = 0;
                if line.len() > FREE {
                    // What comes next would use the line's memory again, all of it, for as long as the watch goes on.
                    self.buffer = BytesMut::from(&self.buffer[..]);
                }
                if std::mem::take(&mut self.skips) {
                    return Ok(Some(Line::TooLong));
                }
                if !line.trim_ascii().is_empty() {
                    return Ok(Some(Line::Text(line)));
                }
                continue;
            }
            if self.buffer.len() > self.longest {
                self.skips = true;
            }
            if self.skips {
                self.buffer = BytesMut::new();
            }
            self.searched = self.buffer.len();
            self.room.fit(self.buffer.len()).await?;
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.room.fit(self.buffer.len() + data.len()).await?;
                        self.buffer.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) if is_an_end(&error) => return Ok(None),
                Some(Err(error)) => return Err(ReadError::BrokeOff(error)),
            }
        }
    }
}

/// Whether a server that has been told to stop, or a proxy on the way, ended an answer in its way.
fn is_an_end(error: &kube::Error) -> bool {
    let mut next: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = next {
        let eof = |error: &io::Error| error.kind() == io::ErrorKind::UnexpectedEof;
        if error.downcast_ref().is_some_and(eof) {
            return true;
        }
        next = error.source();
    }
    false
}

// === impl Objects ===

impl Objects {
    /// An object, if it is there. A server that does not know the type says nothing of that, and fails.
    pub(crate) async fn get_opt(&self, name: &str) -> Result<Option<DynamicObject>, ReadError> {
        match self.reader.object(self.path.get(name, &GetParams::default())?).await {
            Ok(found) => Ok(Some(answers::dynamic(found)?)),
            Err(error) if error.says_gone(name) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// As [`Self::get_opt`], with who owns which of its fields.
    pub(crate) async fn with_owners(&self, name: &str) -> Result<Option<Value>, ReadError> {
        match self.reader.answer(self.path.get(name, &GetParams::default())?).await {
            Ok(answer) => Ok(Some(answers::object_with_owners(&answer.text, MAX_OBJECT)?)),
            Err(error) if error.says_gone(name) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Patches an object; gives it back as it is then.
    pub(crate) async fn patch<P: Serialize>(
        &self,
        name: &str,
        params: &PatchParams,
        patch: &Patch<P>,
    ) -> Result<DynamicObject, ReadError> {
        Ok(answers::dynamic(self.reader.object(self.path.patch(name, params, patch)?).await?)?)
    }

    /// Deletes an object. Returns whether the server shows it still: with finalizers it stays for a while, and a server also
    /// gives back what it has just removed.
    pub(crate) async fn delete(&self, name: &str, params: &DeleteParams) -> Result<bool, ReadError> {
        match self.reader.object(self.path.delete(name, params)?).await {
            Ok(answer) => Ok(answer["kind"] != "Status"),
            // It may.
            Err(ReadError::Unreadable(_)) => Ok(true),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::future::pending;

    use http_body_util::StreamBody;
    use hyper::body::Frame;
    use tokio::sync::Barrier;

    use super::*;

    /// A reader of a member that answers everything with this status and these pieces, and then neither goes on nor ends if
    /// `hangs`.
    fn member(code: u16, pieces: Vec<Bytes>, hangs: bool, shares: &Shares) -> Reader {
        let server = tower::service_fn(move |_: Request<Body>| {
            let frames = pieces.clone().into_iter().map(|piece| Ok::<_, Infallible>(Frame::data(piece)));
            async move {
                let end = futures::stream::once(async move {
                    if hangs {
                        pending::<()>().await;
                    }
                    Ok(Frame::data(Bytes::new()))
                });
                let frames = futures::StreamExt::chain(futures::stream::iter(frames), end);
                let mut response = Response::new(StreamBody::new(frames));
                *response.status_mut() = http::StatusCode::from_u16(code).expect("a status");
                Ok::<_, Infallible>(response)
            }
        });
        Reader::of_member(kube::Client::new(server, "default"), shares, Counter::default())
    }

    fn ask() -> Request<Vec<u8>> {
        Request::get("/version").body(Vec::new()).expect("a request")
    }

    fn pieces(count: usize) -> Vec<Bytes> {
        vec![Bytes::from(vec![b'x'; 1 << 20]); count]
    }

    #[tokio::test]
    async fn what_is_no_json_is_repeated_nowhere() {
        let words = Bytes::from_static(b"hunter2\nWARN forged: line");
        let reader = member(200, vec![words.clone()], false, &Shares::default());
        let error = reader.object(ask()).await.expect_err("no object");
        assert_eq!(crate::member::chain(&error), "an object cannot be read: it is not the JSON of an object");
        // Of a refusal a beginning is told, and the code is that of the answer.
        let long = vec![words, Bytes::from(vec![b'y'; 1 << 20])];
        let refused = member(503, long, true, &Shares::default()).object(ask()).await.expect_err("refused");
        let status = refused.status().expect("a status");
        assert_eq!((status.code, status.message.len()), (503, MAX_REFUSAL));
    }

    #[tokio::test]
    async fn only_an_object_that_is_named_is_gone() {
        let types = ApiResource::from_gvk(&kube::core::GroupVersionKind::gvk("apps", "v1", "Deployment"));
        let get = async |answer: &'static str| {
            let answer = vec![Bytes::from_static(answer.as_bytes())];
            member(404, answer, false, &Shares::default()).objects(&types, Some("shop")).get_opt("web").await
        };
        let gone = r#"{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404,
            "message": "deployments.apps \"web\" not found", "details": {"name": "web", "group": "apps", "kind": "deployments"}}"#;
        assert!(get(gone).await.expect("told").is_none());
        // The path of a type that is not served, as servers of Kubernetes' own and others say it.
        for unserved in [
            "404 page not found\n",
            r#"{"kind": "Status", "reason": "NotFound", "message": "the server could not find the requested resource", "code": 404}"#,
            r#"{"kind": "Status", "reason": "NotFound", "message": "no", "details": {"kind": "deployments"}, "code": 404}"#,
        ] {
            let error = get(unserved).await.expect_err("nothing is said of the object");
            assert!(error.is_unserved() && !error.says_gone("web"), "{error}");
        }
        let another = r#"{"kind": "Status", "code": 404, "details": {"name": "shop", "kind": "namespaces"}}"#;
        let error = get(another).await.expect_err("another object is not there");
        assert!(!error.is_unserved() && !error.says_gone("web"), "{error}");
    }

    #[tokio::test]
    async fn an_answer_without_end_is_given_up() {
        let shares = Shares::default();
        let error = member(200, pieces(17), true, &shares).object(ask()).await.expect_err("too long");
        assert!(matches!(error, ReadError::TooLong(MAX_ANSWER)), "{error}");
        assert_eq!(shares.left(), ALL_SHARES, "nothing is held of it");
    }

    #[tokio::test(start_paused = true)]
    async fn one_member_cannot_hold_what_all_need() {
        let shares = Shares::default();
        let evil = member(200, pieces(15), true, &shares);
        let mut reading = Vec::new();
        let mut refused = 0;
        for _ in 0..50 {
            let mut one = Box::pin(evil.object(ask()));
            match timeout(Duration::from_secs(1), &mut one).await {
                Err(_) => reading.push(one),
                Ok(Err(ReadError::Busy)) => refused += 1,
                Ok(other) => panic!("{other:?}"),
            }
        }
        assert_eq!((reading.len(), refused), (3, 47));
        let left = shares.left();
        assert!(left >= ALL_SHARES - MEMBER_SHARE, "{left}");
        // Another reads as if it were alone.
        let text = format!("{{\"data\":\"{}\"}}", "z".repeat(8 << 20));
        let honest = member(200, vec![Bytes::from(text)], false, &shares);
        assert!(honest.object(ask()).await.is_ok());
        drop(reading);
        assert_eq!(shares.left(), ALL_SHARES);
    }

    /// An answer of two halves, of which the second one comes when everybody has the first one.
    async fn in_halves(half: usize, meet: Arc<Barrier>, shares: Shares) -> Result<Value, ReadError> {
        let server = tower::service_fn(move |_: Request<Body>| {
            let meet = Arc::clone(&meet);
            async move {
                let first = futures::stream::once(async move { Ok(text(b'{', b' ', half)) });
                let second = futures::stream::once(async move {
                    meet.wait().await;
                    Ok::<_, Infallible>(text(b' ', b'}', half))
                });
                let frames = futures::StreamExt::chain(first, second);
                Ok::<_, Infallible>(Response::new(StreamBody::new(frames)))
            }
        });
        let client = kube::Client::new(server, "default");
        Reader::of_member(client, &shares, Counter::default()).object(ask()).await
    }

    fn text(first: u8, last: u8, length: usize) -> Frame<Bytes> {
        let mut text = vec![b' '; length];
        (text[0], text[length - 1]) = (first, last);
        Frame::data(Bytes::from(text))
    }

    #[tokio::test(start_paused = true)]
    async fn members_that_hold_all_the_room_do_not_wait_for_each_other_without_end() {
        const HALF: usize = MAX_ANSWER / 2;
        // With all the first halves there is no room for a single second one.
        const MEMBERS: usize = (ALL_SHARES - MAX_ANSWER) / HALF;
        let shares = Shares::default();
        let meet = Arc::new(Barrier::new(MEMBERS));
        let all = (0..MEMBERS).map(|_| in_halves(HALF, Arc::clone(&meet), shares.clone()));
        let all =
            timeout(Duration::from_secs(1), futures::future::join_all(all)).await.expect("they are read");
        all.into_iter().for_each(|one| drop(one.expect("an object")));
        assert_eq!(shares.left(), ALL_SHARES);
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_room_goes_to_one_after_another() {
        let shares = Shares::default();
        let taken = shares.all.available_permits();
        let _all = Arc::clone(&shares.all).try_acquire_many_owned(u32::try_from(taken).expect("a number"));
        let room = || {
            let own = Arc::new(Semaphore::new(MEMBER_SHARE / UNIT));
            Room { share: Some(Share { own, shares: shares.clone() }), ..Room::default() }
        };
        let (mut one, mut other) = (room(), room());
        one.fit(MAX_ANSWER / 2).await.expect("room");
        assert!(timeout(Duration::from_secs(1), other.fit(2 * FREE)).await.is_err(), "it is taken");
        other.fit(FREE).await.expect("what is free is free");
        one.fit(MAX_ANSWER).await.expect("whoever has it has all of it");
        one.fit(0).await.expect("no more is needed");
        other.fit(MAX_ANSWER).await.expect("the next");
        drop((one, other));
        assert_eq!(shares.left(), MAX_ANSWER, "and is given back");
    }

    #[tokio::test]
    async fn a_long_line_leaves_no_room_behind() {
        let line = |length: usize| Bytes::from(format!("{}\n", "a".repeat(length)));
        // Of the short ones more than is left behind the long one.
        let mut all = vec![line(MAX_ANSWER - 1)];
        all.extend((0..MAX_ANSWER / FREE).map(|_| line(FREE - 1)));
        let mut lines = member(200, all, false, &Shares::default()).lines(ask()).await.expect("a watch");
        while lines.next().await.expect("a line").is_some() {
            assert!(lines.buffer.capacity() <= 4 * FREE, "{}", lines.buffer.capacity());
        }
    }

    #[tokio::test]
    async fn a_watch_is_as_long_as_it_likes_and_its_lines_are_not() {
        let shares = Shares::default();
        let line = |text: &str| Bytes::from(format!("{text}\n"));
        // A hundred megabytes of lines, one that is longer than any may be, and one behind it.
        let mut all: Vec<Bytes> = (0..100).map(|_| line(&"a".repeat(1 << 20))).collect();
        all.extend(pieces(17));
        all.extend([line("end of it"), line(""), line("behind")]);
        let mut lines = member(200, all, false, &shares).lines(ask()).await.expect("a watch");
        for number in 0..100 {
            let Some(Line::Text(text)) = lines.next().await.expect("a line") else { panic!("{number}") };
            assert_eq!(text.len(), (1 << 20) + 1);
        }
        assert_eq!(lines.next().await.expect("a line"), Some(Line::TooLong));
        assert_eq!(lines.next().await.expect("a line"), Some(Line::Text(line("behind"))));
        assert_eq!(lines.next().await.expect("the end"), None);
        assert_eq!(shares.left(), ALL_SHARES);
    }
}
