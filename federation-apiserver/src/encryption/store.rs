//! The store behind encryption: the same operations, with values as the registry knows them.

use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use federation_store::{
    Event, Expect, KeyRange, KeyValue, ListRequest, ListResponse, Revision, Store, Transaction,
    TransactionOutcome, Watcher, Write, WriteOutcome,
};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

use super::{Encryption, EncryptionError};
use crate::upkeep::Upkeep;

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreFault {
    #[error(transparent)]
    Store(#[from] federation_store::Error),
    #[error("failed to encrypt or decrypt {key}")]
    Encryption {
        key: String,
        #[source]
        source: EncryptionError,
    },
}

/// The store, with encryption. What has nothing to do with values is the [`Store`]'s own.
#[derive(Clone)]
pub(crate) struct StoreHandle {
    store: Store,
    encryption: Arc<Encryption>,
    upkeep: Arc<Upkeep>,
}

/// A [`Watcher`] whose events hold readable values.
pub(crate) struct StoreWatcher {
    watcher: Watcher,
    encryption: Arc<Encryption>,
    /// Taken from the watcher and not yet readable: a cancelled wait for a plug-in loses no event.
    pending: Option<Arc<Event>>,
    /// The same on its way. It goes on while nobody waits: what was asked of a plug-in is heard to its end, instead of being
    /// asked anew by each who waits for a moment.
    opening: Option<AbortOnDropHandle<Event>>,
}

impl std::fmt::Debug for StoreHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Store")
    }
}

impl std::ops::Deref for StoreHandle {
    type Target = Store;

    fn deref(&self) -> &Store {
        &self.store
    }
}

async fn open(encryption: &Encryption, kv: &mut KeyValue) -> Result<(), StoreFault> {
    let value = std::mem::take(&mut kv.value);
    let failed =
        |source| StoreFault::Encryption { key: String::from_utf8_lossy(&kv.key).into_owned(), source };
    kv.value = encryption.open(&kv.key, value).await.map_err(failed)?;
    Ok(())
}

/// As [`open`], but what cannot be decrypted stays as it is stored: it is no JSON, so whoever asks for just that object
/// gets an error, and everybody else their answer.
async fn open_if_possible(encryption: &Encryption, kv: &mut KeyValue) {
    let stored = kv.value.clone();
    if let Err(fault) = open(encryption, kv).await {
        kv.value = stored;
        encryption.note_unreadable(&fault);
    }
}

// === impl StoreHandle ===

impl StoreHandle {
    pub(crate) fn new(store: Store, encryption: Arc<Encryption>) -> Self {
        Self { store, encryption, upkeep: Arc::default() }
    }

    /// Work on the whole of it.
    pub(crate) fn upkeep(&self) -> &Arc<Upkeep> {
        &self.upkeep
    }

    pub(crate) fn encryption(&self) -> &Arc<Encryption> {
        &self.encryption
    }

    /// The values as they are stored.
    pub(super) fn raw(&self) -> &Store {
        &self.store
    }

    pub(crate) async fn get(
        &self,
        key: impl AsRef<[u8]>,
        revision: Option<Revision>,
    ) -> Result<(Option<KeyValue>, Revision), StoreFault> {
        let (mut kv, revision) = self.store.get(key, revision).await?;
        if let Some(kv) = &mut kv {
            open(&self.encryption, kv).await?;
        }
        Ok((kv, revision))
    }

    pub(crate) async fn list(&self, request: &ListRequest) -> Result<ListResponse, StoreFault> {
        let mut page = self.store.list(request).await?;
        for kv in &mut page.items {
            open_if_possible(&self.encryption, kv).await;
        }
        Ok(page)
    }

    pub(crate) async fn update(
        &self,
        key: impl Into<Bytes>,
        value: impl Into<Bytes>,
        expected: Revision,
    ) -> Result<WriteOutcome, StoreFault> {
        let key = key.into();
        let value = self.seal(&key, value.into()).await?;
        self.readable(self.store.update(key, value, expected).await?).await
    }

    /// A write with others beside it, all of them or none, where other keys are as expected. `None`: one of the others or of
    /// these does not fit any more.
    pub(crate) async fn write_together(
        &self,
        write: Write,
        others: Vec<Write>,
        expects: Vec<(Bytes, Expect)>,
    ) -> Result<Option<WriteOutcome>, StoreFault> {
        let (key, expect) = (write.key.clone(), write.expect);
        let mut writes = Vec::with_capacity(1 + others.len());
        for mut write in std::iter::once(write).chain(others) {
            if let Some(value) = write.value.take() {
                write.value = Some(self.seal(&write.key, value).await?);
            }
            writes.push(write);
        }
        let transaction = Transaction { writes, expects, ..Transaction::default() };
        let outcome = match self.store.transact(transaction).await? {
            TransactionOutcome::Applied { revision, events } => {
                match events.into_iter().find(|event| event.kv.key == key) {
                    Some(event) => WriteOutcome::Applied { kv: event.kv, previous: None },
                    // A deletion that expects nothing of a key that is not there.
                    None => WriteOutcome::Conflict { current: None, revision },
                }
            }
            TransactionOutcome::Conflict { current: Some(kv), .. } if kv.key != key => return Ok(None),
            TransactionOutcome::Conflict { current, revision } => {
                // Of a key that is missing the answer does not say which one it is.
                if current.is_none()
                    && (expect == Expect::Absent || self.store.get(&key, None).await?.0.is_some())
                {
                    return Ok(None);
                }
                WriteOutcome::Conflict { current, revision }
            }
            TransactionOutcome::NoLease | TransactionOutcome::LeaseExists => return Ok(None),
        };
        Ok(Some(self.readable(outcome).await?))
    }

    /// Is what is stored under a key to be encrypted anew? Where nobody can tell it is, to be certain.
    pub(crate) async fn is_stale(&self, key: &str) -> Result<bool, StoreFault> {
        if !self.encryption.covers(key.as_bytes()) {
            return Ok(false);
        }
        let (kv, _) = self.store.get(key, None).await?;
        Ok(kv.is_some_and(|kv| self.encryption.is_stale(&kv.key, &kv.value) != Some(false)))
    }

    pub(crate) fn watch(&self, range: KeyRange, from: Revision) -> Result<StoreWatcher, StoreFault> {
        let watcher = self.store.watch(range, from)?;
        Ok(StoreWatcher { watcher, encryption: self.encryption.clone(), pending: None, opening: None })
    }

    async fn seal(&self, key: &Bytes, value: Bytes) -> Result<Bytes, StoreFault> {
        let failed =
            |source| StoreFault::Encryption { key: String::from_utf8_lossy(key).into_owned(), source };
        self.encryption.seal(key, value).await.map_err(failed)
    }

    async fn readable(&self, outcome: WriteOutcome) -> Result<WriteOutcome, StoreFault> {
        let mut outcome = outcome;
        match &mut outcome {
            WriteOutcome::Applied { kv, previous } => {
                open(&self.encryption, kv).await?;
                // Nobody needs what was there before to be readable: it may be what a rewrite replaces.
                *previous = None;
            }
            WriteOutcome::Conflict { current: Some(kv), .. } => open(&self.encryption, kv).await?,
            WriteOutcome::Conflict { current: None, .. } => {}
        }
        Ok(outcome)
    }
}

// === impl StoreWatcher ===

impl StoreWatcher {
    /// The next event. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<Arc<Event>, StoreFault> {
        loop {
            if let Some(event) = self.next_unless(|_| false).await? {
                return Ok(event);
            }
        }
    }

    /// The next event, or `None` once there is none up to a revision that is `enough`, which is then [`Self::progress`].
    /// Cancel-safe.
    pub(crate) async fn next_unless(
        &mut self,
        enough: impl Fn(Revision) -> bool,
    ) -> Result<Option<Arc<Event>>, StoreFault> {
        let event = match &self.pending {
            Some(event) => event.clone(),
            None => {
                let position = self.watcher.position();
                let mut next = std::pin::pin!(self.watcher.next());
                let event = std::future::poll_fn(|cx| match next.as_mut().poll(cx) {
                    Poll::Ready(event) => Poll::Ready(Some(event)),
                    Poll::Pending if enough(position.get()) => Poll::Ready(None),
                    Poll::Pending => Poll::Pending,
                });
                let Some(event) = event.await else { return Ok(None) };
                let event = event?;
                self.pending = Some(event.clone());
                event
            }
        };
        let encrypted =
            |kv: &KeyValue| self.encryption.covers(&kv.key) || kv.value.starts_with(super::ENCRYPTED);
        let event = if encrypted(&event.kv) || event.prev_kv.as_ref().is_some_and(encrypted) {
            self.opened(event).await
        } else {
            event
        };
        self.pending = None;
        Ok(Some(event))
    }

    /// The event as it can be read. Cancel-safe.
    async fn opened(&mut self, event: Arc<Event>) -> Arc<Event> {
        let opening = match &mut self.opening {
            Some(opening) => opening,
            None => {
                let (encryption, mut event) = (self.encryption.clone(), Event::clone(&event));
                let mut open = Box::pin(async move {
                    open_if_possible(&encryption, &mut event.kv).await;
                    if let Some(kv) = &mut event.prev_kv {
                        open_if_possible(&encryption, kv).await;
                    }
                    event
                });
                // Mostly there is nobody to wait for: the key is here.
                if let Poll::Ready(event) = futures::poll!(&mut open) {
                    return Arc::new(event);
                }
                self.opening.insert(AbortOnDropHandle::new(tokio::spawn(open.in_current_span())))
            }
        };
        let opened = opening.await;
        self.opening = None;
        // As it is stored, where the task has failed: it cannot be read, then.
        opened.map_or(event, Arc::new)
    }

    /// See [`Watcher::progress`]. An event that waits for its key was not returned yet.
    pub(crate) fn progress(&self) -> Revision {
        match &self.pending {
            Some(event) => Revision(event.revision.0.saturating_sub(1)),
            None => self.watcher.progress(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use federation_store::StoreConfig;
    use prost::Message as _;
    use proto::storage::v1::EncryptedObject;
    use tokio::io::AsyncReadExt as _;
    use tokio::task::JoinSet;

    use super::*;

    #[tokio::test]
    async fn a_plugin_is_asked_once_by_whoever_waits_for_moments() {
        let dir = tempfile::tempdir().expect("a directory");
        let (socket, config) = (dir.path().join("kms.sock"), dir.path().join("encryption.yaml"));
        // It takes what it is asked, and says nothing.
        let listener = tokio::net::UnixListener::bind(&socket).expect("a socket");
        let (came, asked) = tokio::sync::watch::channel(0);
        let mut plugin = JoinSet::new();
        plugin.spawn(async move {
            let (mut connection, _) = listener.accept().await.expect("a connection");
            connection.read_exact(&mut [0; 24]).await.expect("HTTP/2's preface");
            loop {
                let mut head = [0; 9];
                connection.read_exact(&mut head).await.expect("a frame");
                let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
                connection.read_exact(&mut vec![0; length]).await.expect("the rest of it");
                // Each request begins with a HEADERS frame.
                came.send_modify(|requests| *requests += usize::from(head[3] == 1));
            }
        });
        let text = format!(
            "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n- resources: [secrets]\n  providers: [{{kms: {{apiVersion: v2, name: vault, endpoint: 'unix://{}', timeout: 3s}}}}]\n",
            socket.display()
        );
        std::fs::write(&config, text).expect("written");
        let store = Store::open(StoreConfig::in_memory()).await.expect("a store");
        let encryption = Arc::new(Encryption::load(Some(config)).expect("valid"));
        let handle = StoreHandle::new(store.clone(), encryption);
        let mut watcher = handle.watch(KeyRange::prefix("/registry/"), store.revision()).expect("a watch");
        let sealed = EncryptedObject {
            encrypted_data: vec![0; 64].into(),
            key_id: "key".into(),
            encrypted_dek_source: vec![1; 32].into(),
            annotations: Default::default(),
            encrypted_dek_source_type: 1,
        };
        let value = [b"k8s:enc:kms:v2:vault:".as_slice(), &sealed.encode_to_vec()].concat();
        for key in ["/registry/core/secrets/default/a", "/registry/core/secrets/default/b"] {
            store.create(key, value.clone()).await.expect("written");
        }
        tokio::time::pause();
        let moments = async {
            loop {
                if let Ok(event) = tokio::time::timeout(Duration::from_millis(20), watcher.next()).await {
                    return event.expect("an event");
                }
            }
        };
        let event =
            tokio::time::timeout(Duration::from_secs(60), moments).await.expect("the plug-in is given up");
        assert_eq!((event.kv.value.as_ref(), *asked.borrow()), (value.as_slice(), 1));
        // And it was noted: nobody asks for the next one at once.
        watcher.next().await.expect("an event");
        assert_eq!(*asked.borrow(), 1);
    }
}
