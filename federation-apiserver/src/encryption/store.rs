//! The store behind encryption: the same operations, with values as the registry knows them.

use std::sync::Arc;

use bytes::Bytes;
use federation_store::{
    Event, Expect, KeyRange, KeyValue, ListRequest, ListResponse, Revision, Store, Transaction,
    TransactionOutcome, Watcher, Write, WriteOutcome,
};

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

    /// A write with others beside it, all of them or none. `None`: one of the others does not fit any more.
    pub(crate) async fn write_together(
        &self,
        write: Write,
        others: Vec<Write>,
    ) -> Result<Option<WriteOutcome>, StoreFault> {
        let (key, expect) = (write.key.clone(), write.expect);
        let mut writes = Vec::with_capacity(1 + others.len());
        for mut write in std::iter::once(write).chain(others) {
            if let Some(value) = write.value.take() {
                write.value = Some(self.seal(&write.key, value).await?);
            }
            writes.push(write);
        }
        let transaction = Transaction { writes, ..Transaction::default() };
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

    pub(crate) fn watch(&self, range: KeyRange, from: Revision) -> Result<StoreWatcher, StoreFault> {
        let watcher = self.store.watch(range, from)?;
        Ok(StoreWatcher { watcher, encryption: self.encryption.clone(), pending: None })
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
        let event = match &self.pending {
            Some(event) => event.clone(),
            None => {
                let event = self.watcher.next().await?;
                self.pending = Some(event.clone());
                event
            }
        };
        let encrypted =
            |kv: &KeyValue| self.encryption.covers(&kv.key) || kv.value.starts_with(super::ENCRYPTED);
        let event = if encrypted(&event.kv) || event.prev_kv.as_ref().is_some_and(encrypted) {
            let mut event = Event::clone(&event);
            open_if_possible(&self.encryption, &mut event.kv).await;
            if let Some(kv) = &mut event.prev_kv {
                open_if_possible(&self.encryption, kv).await;
            }
            Arc::new(event)
        } else {
            event
        };
        self.pending = None;
        Ok(event)
    }

    /// See [`Watcher::progress`]. An event that waits for its key was not returned yet.
    pub(crate) fn progress(&self) -> Revision {
        match &self.pending {
            Some(event) => Revision(event.revision.0.saturating_sub(1)),
            None => self.watcher.progress(),
        }
    }
}
