//! What is asked of one object, or of those below a prefix, as calls that wait for the answer.
//!
//! Callers are threads that may block; requests run on threads of their own ([`IoThreads`]), so that a caller may also be
//! inside of another runtime.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path as Key;
use object_store::{
    GetOptions, GetRange, GetResult, ListResult, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    PutPayload,
};
use tokio::runtime::Runtime;
use url::Url;

use super::location::Identity;
use crate::error::{StoreFailure, StoreFailureKind, one_line};

/// Bytes of an object that one request can publish, and only one request is conditional: the limit of S3, and about
/// that of Azure.
pub const MAX_PUT_BYTES: u64 = 5 << 30;
/// Times that a PUT is sent which meets another one in flight (409).
const PUT_ATTEMPTS: u32 = 5;
/// Between them.
const PUT_PAUSE: Duration = Duration::from_millis(200);
/// Requests at once where many objects are looked at.
const CONCURRENT_REQUESTS: usize = 16;
/// A client's message quotes the server's page.
const MAX_MESSAGE_CHARS: usize = 400;

/// The result of one question to a store.
pub(super) type Answer<T> = Result<T, StoreFailure>;

/// Threads that requests run on; started by the first one, and left to end by themselves.
#[derive(Default)]
pub(super) struct IoThreads(OnceLock<Option<Runtime>>);

impl IoThreads {
    fn runtime(&self) -> Answer<&Runtime> {
        let start = || {
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("store-io").enable_all().build()
        };
        self.0.get_or_init(|| start().ok()).as_ref().ok_or_else(|| StoreFailure {
            kind: StoreFailureKind::Transient,
            message: "the threads for requests cannot be started".to_owned(),
        })
    }
}

impl Drop for IoThreads {
    fn drop(&mut self) {
        // Waiting for them would panic where the last owner is an asynchronous task.
        if let Some(runtime) = self.0.take().flatten() {
            runtime.shutdown_background();
        }
    }
}

/// Does `work`, which waits for requests, on every item; the results are in the order of the items.
pub(crate) fn concurrently<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut done = Vec::new();
        loop {
            let place = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(place) else { return done };
            done.push((place, work(item)));
        }
    };
    let mut done = std::thread::scope(|scope| {
        let helpers: Vec<_> = (1..CONCURRENT_REQUESTS.min(items.len())).map(|_| scope.spawn(worker)).collect();
        let mut done = worker();
        for helper in helpers {
            match helper.join() {
                Ok(results) => done.extend(results),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    });
    done.sort_by_key(|(place, _)| *place);
    done.into_iter().map(|(_, result)| result).collect()
}

/// One object, or the prefix of many.
#[derive(Clone)]
pub struct Object {
    store: Arc<dyn ObjectStore>,
    /// The URL of the root, as `s3://bucket`.
    base: Arc<str>,
    key: Key,
    io: Arc<IoThreads>,
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {}", self.key, self.store)
    }
}

impl Object {
    pub(super) fn new(store: Arc<dyn ObjectStore>, base: Arc<str>, key: Key, io: Arc<IoThreads>) -> Self {
        Self { store, base, key, io }
    }

    /// The object's address; only those of the web are encoded.
    pub(super) fn url(&self) -> String {
        match Url::parse(&self.base) {
            Ok(mut url) if url.scheme() == "https" => {
                if let Ok(mut segments) = url.path_segments_mut() {
                    segments.pop_if_empty().extend(self.key.parts().map(|part| part.as_ref().to_owned()));
                }
                url.into()
            }
            _ => format!("{}/{}", self.base, self.key),
        }
    }

    /// The URL of the root of the object's store.
    pub(crate) fn base(&self) -> &str {
        &self.base
    }

    /// The object's name in its store; of a prefix without a slash at its end.
    pub(crate) fn key(&self) -> &Key {
        &self.key
    }

    pub(crate) fn store(&self) -> &Arc<dyn ObjectStore> {
        &self.store
    }

    /// Another object of the same store.
    pub(crate) fn with_key(&self, key: Key) -> Self {
        Self { key, ..self.clone() }
    }

    /// Size and version, `None` where there is no such object.
    pub(crate) fn head(&self) -> Answer<Option<Identity>> {
        let (store, key) = (self.store.clone(), self.key.clone());
        self.found(async move { Ok(Identity::of_object(&store.head(&key).await?)) })
    }

    /// The whole object, `None` where there is none; for small ones.
    pub(crate) fn read(&self) -> Answer<Option<Bytes>> {
        let (store, key) = (self.store.clone(), self.key.clone());
        self.found(async move { store.get(&key).await?.bytes().await })
    }

    /// Bytes of the object that `identity` was taken of, and of no other.
    pub(super) fn read_range(&self, identity: &Identity, range: Range<u64>) -> Answer<Bytes> {
        let (store, key, wanted) = (self.store.clone(), self.key.clone(), identity.clone());
        let options = ranged(identity, range.clone());
        let bytes = self.wait(async move {
            let result = store.get_opts(&key, options).await?;
            let now = Identity::of_object(&result.meta);
            Ok((wanted.difference(&now), collect(result).await?))
        })?;
        match bytes {
            // Not every server honours the condition of the request.
            (Some(difference), _) => Err(StoreFailure { kind: StoreFailureKind::Changed, message: difference }),
            (None, bytes) if bytes.len() as u64 != range.end - range.start => Err(StoreFailure {
                kind: StoreFailureKind::Transient,
                message: format!("it sent {} bytes of {}", bytes.len(), range.end - range.start),
            }),
            (None, bytes) => Ok(bytes),
        }
    }

    /// Publishes `payload` where there is no object, and tells whether it is there now because of this call.
    ///
    /// `false` means that an object stands there, which may be this payload all the same: the reply to a request of ours
    /// may have been lost. The caller looks at what the object carries.
    pub(crate) fn put_if_absent(&self, payload: PutPayload) -> Answer<bool> {
        let mut attempt = 1;
        loop {
            let (store, key, payload) = (self.store.clone(), self.key.clone(), payload.clone());
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            let sent = self.wait(async move {
                match store.put_opts(&key, payload, options).await {
                    Ok(_) => Ok(Sent::Stored),
                    Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                        Ok(Sent::InTheWay)
                    }
                    Err(error) => match failure(&error) {
                        lost if lost.kind == StoreFailureKind::Transient => Ok(Sent::Lost(lost)),
                        refused => Ok(Sent::Refused(refused)),
                    },
                }
            })?;
            match sent {
                Sent::Stored => return Ok(true),
                Sent::Refused(refused) => return Err(refused),
                Sent::Lost(lost) => return if self.head()?.is_some() { Ok(false) } else { Err(lost) },
                Sent::InTheWay if self.head()?.is_some() => return Ok(false),
                // The other request in flight came to nothing.
                Sent::InTheWay if attempt < PUT_ATTEMPTS => {
                    attempt += 1;
                    std::thread::sleep(PUT_PAUSE);
                }
                Sent::InTheWay => {
                    let message = "it says that the object exists, and does not have it".to_owned();
                    return Err(StoreFailure { kind: StoreFailureKind::Transient, message });
                }
            }
        }
    }

    /// Puts `payload` in the object's place, whatever stands there.
    pub(crate) fn put_over(&self, payload: PutPayload) -> Answer<()> {
        let (store, key) = (self.store.clone(), self.key.clone());
        self.wait(async move { store.put(&key, payload).await.map(|_| ()) })
    }

    /// Removes the object; that there is none is no failure.
    pub(crate) fn remove(&self) -> Answer<()> {
        let (store, key) = (self.store.clone(), self.key.clone());
        self.found(async move { store.delete(&key).await }).map(|_| ())
    }

    /// Every object below this prefix, in no order.
    pub(crate) fn below(&self) -> Answer<Vec<(Object, Identity)>> {
        let (store, key) = (self.store.clone(), self.key.clone());
        let found: Vec<ObjectMeta> = self.wait(async move { store.list(prefix(&key).as_ref()).try_collect().await })?;
        Ok(found.into_iter().map(|meta| (self.with_key(meta.location.clone()), Identity::of_object(&meta))).collect())
    }

    /// Whether there is any object below this prefix.
    pub(crate) fn is_prefix(&self) -> Answer<bool> {
        let (store, key) = (self.store.clone(), self.key.clone());
        self.wait(async move { Ok(store.list(prefix(&key).as_ref()).try_next().await?.is_some()) })
    }

    /// The objects right below this prefix, and the prefixes there.
    pub(super) fn children(&self) -> Answer<Children> {
        let (store, key) = (self.store.clone(), self.key.clone());
        let ListResult { objects, common_prefixes, .. } =
            self.wait(async move { store.list_with_delimiter(prefix(&key).as_ref()).await })?;
        // Some consoles make an object of the folder's own name.
        let objects = objects.into_iter().filter(|meta| meta.location != self.key);
        let objects = objects.map(|meta| (self.with_key(meta.location.clone()), Identity::of_object(&meta)));
        Ok(Children { objects: objects.collect(), prefixes: common_prefixes })
    }

    fn found<T: Send + 'static>(
        &self,
        request: impl Future<Output = object_store::Result<T>> + Send + 'static,
    ) -> Answer<Option<T>> {
        self.wait(async move {
            match request.await {
                Ok(value) => Ok(Some(value)),
                Err(object_store::Error::NotFound { .. }) => Ok(None),
                Err(error) => Err(error),
            }
        })
    }

    fn wait<T: Send + 'static>(
        &self,
        request: impl Future<Output = object_store::Result<T>> + Send + 'static,
    ) -> Answer<T> {
        let (sender, receiver) = channel();
        self.io.runtime()?.spawn(async move {
            // Nobody waits any more where the caller has ended.
            let _ = sender.send(request.await);
        });
        match receiver.recv() {
            Ok(answer) => answer.map_err(|error| failure(&error)),
            Err(_) => Err(StoreFailure {
                kind: StoreFailureKind::Refused,
                message: "the client ended without an answer".to_owned(),
            }),
        }
    }
}

/// What stands right below a prefix, in no order.
pub(super) struct Children {
    pub objects: Vec<(Object, Identity)>,
    pub prefixes: Vec<Key>,
}

/// What became of a PUT.
enum Sent {
    Stored,
    InTheWay,
    Lost(StoreFailure),
    Refused(StoreFailure),
}

/// The root has no prefix.
fn prefix(key: &Key) -> Option<Key> {
    Some(key.clone()).filter(|key| !key.is_root())
}

fn ranged(identity: &Identity, range: Range<u64>) -> GetOptions {
    // A weak etag never matches (RFC 9110, 13.1.1).
    let etag = identity.etag.clone().filter(|etag| !etag.starts_with("W/"));
    let unmodified: Option<DateTime<Utc>> = match etag {
        Some(_) => None,
        None => identity.modified_ns.map(DateTime::from_timestamp_nanos),
    };
    GetOptions {
        if_match: etag,
        if_unmodified_since: unmodified,
        range: Some(GetRange::Bounded(range)),
        ..GetOptions::default()
    }
}

async fn collect(result: GetResult) -> object_store::Result<Bytes> {
    let mut stream = result.into_stream();
    let Some(first) = stream.next().await.transpose()? else { return Ok(Bytes::new()) };
    let Some(second) = stream.next().await.transpose()? else { return Ok(first) };
    let mut bytes = Vec::with_capacity(2 * (first.len() + second.len()));
    bytes.extend_from_slice(&first);
    bytes.extend_from_slice(&second);
    while let Some(piece) = stream.next().await.transpose()? {
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes.into())
}

/// What a client's error asks of its reader.
pub(crate) fn failure(error: &object_store::Error) -> StoreFailure {
    use object_store::Error;
    let message = one_line(error);
    let kind = match error {
        Error::NotFound { .. } => StoreFailureKind::Missing,
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => StoreFailureKind::Denied,
        Error::Precondition { .. } | Error::NotModified { .. } => StoreFailureKind::Changed,
        Error::NotSupported { .. } | Error::NotImplemented { .. } => StoreFailureKind::Unsupported,
        Error::InvalidPath { .. } | Error::UnknownConfigurationKey { .. } | Error::AlreadyExists { .. } => {
            StoreFailureKind::Refused
        }
        // What clients of clouds say when they find no credentials and ask the machine for some.
        _ if ["169.254.169.254", "metadata.google", "metadata server", "InvalidCredentials"]
            .iter()
            .any(|sign| message.contains(sign)) =>
        {
            StoreFailureKind::Denied
        }
        _ => match status(&message) {
            Some(400..500) => StoreFailureKind::Refused,
            _ => StoreFailureKind::Transient,
        },
    };
    let message = match message.char_indices().nth(MAX_MESSAGE_CHARS) {
        Some((end, _)) => format!("{}…", &message[..end]),
        None => message,
    };
    StoreFailure { kind, message }
}

/// The HTTP status that a client's message quotes: its error has none.
fn status(message: &str) -> Option<u16> {
    let (_, rest) = message.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, ExitCode};

    #[test]
    fn failures_are_told_apart() {
        let generic = |message: &str| object_store::Error::Generic { store: "S3", source: message.into() };
        let at = || "k".to_owned();
        for (error, code) in [
            (generic("Server returned non-2xx status code: 503 Service Unavailable: "), ExitCode::TryAgain),
            (generic("Server returned non-2xx status code: 400 Bad Request: "), ExitCode::Io),
            (generic("error sending request: operation timed out"), ExitCode::TryAgain),
            (generic("Error performing PUT http://169.254.169.254/latest/api/token"), ExitCode::Unavailable),
            (object_store::Error::PermissionDenied { path: at(), source: "403".into() }, ExitCode::Unavailable),
            (object_store::Error::Unauthenticated { path: at(), source: "401".into() }, ExitCode::Unavailable),
            (object_store::Error::NotFound { path: at(), source: "404".into() }, ExitCode::NoInput),
            (object_store::Error::Precondition { path: at(), source: "412".into() }, ExitCode::InputData),
            (
                object_store::Error::NotImplemented { operation: "put".into(), implementer: "x".into() },
                ExitCode::CannotCreate,
            ),
        ] {
            let said = error.to_string();
            let error = Error::Store { action: "read", path: "s3://b/k".into(), failure: failure(&error) };
            assert_eq!(error.exit_code(), code, "{said}");
            assert!(error.to_string().starts_with("cannot read s3://b/k: "), "{error}");
        }
        assert!(failure(&generic(&"x".repeat(5000))).message.chars().count() <= MAX_MESSAGE_CHARS + 1);
    }
}
