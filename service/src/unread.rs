//! Answers on their way, and whether their client takes them.
//!
//! ```text
//!   handler ─▶ Tracked (pieces of 16 KiB) ─▶ HTTP/1.1 or HTTP/2 ─▶ socket
//!                 │ asked for more?              │ piece written and dropped?
//!                 └────────────▶ Answer ◀────────┘
//! ```
//!
//! An answer stands still when there is something of it to send and nothing of it has gone for a while: the client does
//! not read, or never opens its stream's window. One that has nothing to send does not: a watch without news, or what a
//! member sends slowly. Nor is a client to blame for a slow line: while the line takes something, and less than there is,
//! nobody's answer is dropped, however many share it. One that has a time of its own ([`crate::http::Deadline`]) ends with that,
//! whatever the line does: what it holds is wanted elsewhere.

use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use hyper::body::{Frame, SizeHint};
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

/// What is handed on at once, an HTTP/2 frame. A client has the whole time for each: of 200 answers that share one
/// connection's window each moves so much in a minute at 55 KB/s in all.
const PIECE: usize = 16 * 1024;

tokio::task_local! {
    /// Ends the HTTP/2 stream whose task this is.
    static STREAM: CancellationToken;
}

/// The answers of a connection. `H` is held until the last byte of one has been written.
#[derive(Debug)]
pub(crate) struct Answers<H>(Mutex<Listed<H>>);

#[derive(Debug)]
struct Listed<H> {
    answers: Vec<Weak<Answer<H>>>,
    /// Those that have ended are taken off when there are so many.
    sweep_at: usize,
}

/// What is to be done about answers that stand still.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Fine,
    /// Their streams were ended; the connection's other ones go on.
    StreamsEnded(usize),
    /// Only the end of the connection ends them.
    Stuck,
}

#[derive(Debug)]
struct Answer<H> {
    state: Mutex<State>,
    stream: Option<CancellationToken>,
    _held: H,
}

#[derive(Debug)]
struct State {
    /// Handed on and not written yet.
    pieces: usize,
    /// It may have more, and has not been asked.
    owed: bool,
    /// When something of it went last.
    since: Instant,
    /// Its stream was ended.
    ended: bool,
    /// By when all of it has to have gone.
    until: Option<Instant>,
}

/// A body that is watched.
pub(crate) struct Tracked<H> {
    body: Body,
    /// Of the last frame.
    rest: Bytes,
    answer: Arc<Answer<H>>,
}

/// Bytes that tell when nobody needs them any more.
struct Piece<H> {
    bytes: Bytes,
    answer: Arc<Answer<H>>,
}

/// Runs HTTP/2 streams, each in a task that can be ended by itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StreamTasks;

// === impl Answers ===

impl<H: Send + Sync + 'static> Answers<H> {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Listed { answers: Vec::new(), sweep_at: 16 }))
    }

    /// Watches an answer in the task of its stream. An `unhurried` one may stand still for ever; one with a time, if it has
    /// `until`, ends then in any case.
    pub(crate) fn track(&self, body: Body, held: H, unhurried: bool, until: Option<Instant>) -> Body {
        let state = State { pieces: 0, owed: true, since: Instant::now(), ended: false, until };
        let stream = STREAM.try_with(Clone::clone).ok();
        let answer = Arc::new(Answer { state: Mutex::new(state), stream, _held: held });
        if !unhurried {
            let mut listed = self.0.lock();
            if listed.answers.len() >= listed.sweep_at {
                listed.answers.retain(|answer| answer.strong_count() > 0);
                listed.sweep_at = 16 + 2 * listed.answers.len();
            }
            listed.answers.push(Arc::downgrade(&answer));
        }
        Body::new(Tracked { body, rest: Bytes::new(), answer })
    }

    /// Looks for answers whose time is over, and, unless the line is `slow`, for those that have stood still for as long as
    /// `limit`.
    pub(crate) fn look(&self, limit: Duration, slow: bool) -> Verdict {
        let mut ended = 0;
        // Not under the lock: the last one to hold an answer gives back what is held with it.
        let answers: Vec<_> = self.0.lock().answers.iter().filter_map(Weak::upgrade).collect();
        for answer in answers {
            let mut state = answer.state.lock();
            let still = !slow && state.since.elapsed() >= limit;
            // What its stream has left in the connection's queue has the ordinary time to go.
            let over = !state.ended && state.until.is_some_and(|until| Instant::now() >= until);
            if !(state.owed || state.pieces > 0) || !(still || over) {
                continue;
            }
            match &answer.stream {
                Some(stream) if !state.ended => {
                    stream.cancel();
                    (state.ended, state.since) = (true, Instant::now());
                    ended += 1;
                }
                // What an ended stream has left in the connection's queue stays there until it is taken.
                _ => return Verdict::Stuck,
            }
        }
        if ended == 0 { Verdict::Fine } else { Verdict::StreamsEnded(ended) }
    }
}

// === impl Tracked ===

impl<H: Send + Sync + 'static> Tracked<H> {
    fn next_piece(&mut self) -> Frame<Bytes> {
        let bytes = self.rest.split_to(self.rest.len().min(PIECE));
        let mut state = self.answer.state.lock();
        (state.owed, state.since) = (true, Instant::now());
        state.pieces += 1;
        drop(state);
        Frame::data(Bytes::from_owner(Piece { bytes, answer: self.answer.clone() }))
    }
}

impl<H: Send + Sync + 'static> hyper::body::Body for Tracked<H> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.rest.is_empty() {
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(bytes) if !bytes.is_empty() => self.rest = bytes,
                    Ok(nothing) => return Poll::Ready(Some(Ok(Frame::data(nothing)))),
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                Poll::Pending => {
                    self.answer.state.lock().owed = false;
                    return Poll::Pending;
                }
                ended => return ended,
            }
        }
        Poll::Ready(Some(Ok(self.next_piece())))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let below = self.body.size_hint();
        let rest = self.rest.len() as u64;
        let mut hint = SizeHint::new();
        hint.set_lower(below.lower() + rest);
        if let Some(upper) = below.upper() {
            hint.set_upper(upper + rest);
        }
        hint
    }
}

impl<H> Drop for Tracked<H> {
    fn drop(&mut self) {
        self.answer.state.lock().owed = false;
    }
}

// === impl Piece ===

impl<H> AsRef<[u8]> for Piece<H> {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl<H> Drop for Piece<H> {
    fn drop(&mut self) {
        let mut state = self.answer.state.lock();
        state.pieces -= 1;
        state.since = Instant::now();
    }
}

// === impl StreamTasks ===

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for StreamTasks {
    fn execute(&self, stream: F) {
        let end = CancellationToken::new();
        let task = async move {
            tokio::select! {
                () = STREAM.scope(end.clone(), stream) => {}
                () = end.cancelled() => {}
            }
        };
        // As with hyper's own executor, the streams of a connection end with it: their halves in it do.
        tokio::spawn(task.in_current_span());
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use hyper::body::Body as _;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    async fn frame(body: &mut Body) -> Option<Bytes> {
        let frame = poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await?;
        Some(frame.expect("no error").into_data().expect("data"))
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_moves_does_not_stand_still() {
        let held = Arc::new(());
        let answers = Answers::new();
        let mut body = answers.track(Body::from(vec![7; 3 * PIECE + 1]), held.clone(), false, None);
        assert_eq!(body.size_hint().exact(), Some(3 * PIECE as u64 + 1));
        for (size, left) in [(PIECE, 2 * PIECE + 1), (PIECE, PIECE + 1), (PIECE, 1), (1, 0)] {
            tokio::time::advance(LIMIT / 2).await;
            let piece = frame(&mut body).await.expect("a piece");
            assert_eq!((piece.len(), body.size_hint().exact()), (size, Some(left as u64)));
            tokio::time::advance(LIMIT - Duration::from_millis(1)).await;
            assert_eq!(answers.look(LIMIT, false), Verdict::Fine);
        }
        assert!(body.is_end_stream());
        drop(body);
        assert_eq!(Arc::strong_count(&held), 1, "the last byte has gone");
        tokio::time::advance(10 * LIMIT).await;
        assert_eq!(answers.look(LIMIT, false), Verdict::Fine);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_not_taken_stands_still() {
        let never_asked = Answers::new();
        let _body = never_asked.track(Body::from("x"), (), false, None);
        let unhurried = Answers::new();
        let _paused = unhurried.track(Body::from("x"), (), true, None);
        let unwritten = Answers::new();
        let mut body = unwritten.track(Body::from("x"), (), false, None);
        let piece = frame(&mut body).await;
        drop(body);
        let no_news = Answers::new();
        let mut watch = no_news.track(silent(), (), false, None);
        let polled = poll_fn(|cx| Poll::Ready(Pin::new(&mut watch).poll_frame(cx).is_pending())).await;
        assert!(polled);
        tokio::time::advance(LIMIT).await;
        assert_eq!(never_asked.look(LIMIT, false), Verdict::Stuck);
        assert_eq!(
            unwritten.look(LIMIT, false),
            Verdict::Stuck,
            "the connection has it, and its client does not"
        );
        assert_eq!(unhurried.look(LIMIT, false), Verdict::Fine);
        assert_eq!(no_news.look(LIMIT, false), Verdict::Fine);
        drop(piece);
        assert_eq!(unwritten.look(LIMIT, false), Verdict::Fine);
    }

    /// A line that takes one byte after another keeps nobody's room.
    #[tokio::test(start_paused = true)]
    async fn an_answer_ends_with_its_time_whatever_the_line_does() {
        let answers = Answers::new();
        let (first, second) = (CancellationToken::new(), CancellationToken::new());
        let soon = Some(Instant::now() + LIMIT / 4);
        let mut body = STREAM.sync_scope(first.clone(), || answers.track(Body::from("x"), (), false, soon));
        let _patient = STREAM.sync_scope(second.clone(), || answers.track(Body::from("x"), (), false, None));
        let piece = frame(&mut body).await;
        assert_eq!(answers.look(LIMIT, true), Verdict::Fine);
        tokio::time::advance(LIMIT / 4).await;
        assert_eq!(answers.look(LIMIT, true), Verdict::StreamsEnded(1));
        assert!(first.is_cancelled() && !second.is_cancelled());
        assert_eq!(answers.look(LIMIT, true), Verdict::Fine, "it was ended");
        drop((body, piece));
        let gone = answers.track(Body::empty(), (), false, soon);
        drop(gone);
        assert_eq!(answers.look(LIMIT, true), Verdict::Fine, "nothing of it is left");
        let _alone = answers.track(Body::from("x"), (), false, soon);
        assert_eq!(answers.look(LIMIT, true), Verdict::Stuck, "only the connection's end ends this one");
    }

    /// A body that never has anything.
    fn silent() -> Body {
        struct Silent;
        impl hyper::body::Body for Silent {
            type Data = Bytes;
            type Error = std::convert::Infallible;

            fn poll_frame(
                self: Pin<&mut Self>,
                _: &mut Context<'_>,
            ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
                Poll::Pending
            }
        }
        Body::new(Silent)
    }

    #[tokio::test]
    async fn what_has_ended_is_forgotten() {
        let answers = Answers::new();
        for _ in 0..10_000 {
            drop(answers.track(Body::empty(), (), false, None));
        }
        assert!(answers.0.lock().answers.len() <= 16);
    }
}
