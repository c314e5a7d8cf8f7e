//! A store in memory that fails as it is told, for tests.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::memory::InMemory;
use object_store::path::Path as Key;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

use super::Stores;

/// What goes wrong with a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fault {
    /// 503, and nothing is done.
    Unavailable,
    /// It is done, and the reply is lost.
    LostReply,
    /// It is done, the reply is lost, and the client's second try is told that the object exists.
    LostThenRefused,
    /// 409: another request is in flight; nothing is done.
    Conflict,
    /// 403.
    Denied,
    /// Conditional reads are not known.
    IgnoreConditions,
    /// A listing that does not know of anything yet.
    ListsLate,
    /// Not even tried: the process is gone.
    Dead,
}

/// A store that keeps its objects in memory.
pub(crate) struct FaultyStore {
    objects: InMemory,
    faults: Mutex<Vec<(&'static str, Fault, Range<usize>)>>,
    calls: Mutex<HashMap<&'static str, usize>>,
    replacement: Mutex<Option<(usize, Key, Vec<u8>)>>,
}

impl FaultyStore {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            objects: InMemory::new(),
            faults: Mutex::default(),
            calls: Mutex::default(),
            replacement: Mutex::default(),
        })
    }

    /// Clients of this store alone, as `s3://bucket`.
    pub(crate) fn stores(self: &Arc<Self>) -> Stores {
        Stores::default().with_store("s3://bucket", self.clone())
    }

    /// Lets the requests of a kind ("put", "get", "head", "list", "delete", or "any") fail whose numbers, counted from now
    /// on, are in `which`.
    pub(crate) fn fail(&self, kind: &'static str, fault: Fault, which: Range<usize>) {
        self.calls.lock().unwrap().remove(kind);
        self.faults.lock().unwrap().push((kind, fault, which));
    }

    pub(crate) fn heal(&self) {
        self.faults.lock().unwrap().clear();
    }

    /// Lets somebody put `content` at `key` once as many objects were put.
    pub(crate) fn replace_after_puts(&self, puts: usize, key: &str, content: Vec<u8>) {
        *self.replacement.lock().unwrap() = Some((puts, Key::parse(key).unwrap(), content));
    }

    /// Requests of a kind since the last fault for it was set.
    pub(crate) fn count(&self, kind: &str) -> usize {
        self.calls.lock().unwrap().get(kind).copied().unwrap_or(0)
    }

    fn fault(&self, kind: &'static str) -> Option<Fault> {
        let mut calls = self.calls.lock().unwrap();
        let faults = self.faults.lock().unwrap();
        let mut found = None;
        for kind in [kind, "any"] {
            let call = calls.entry(kind).or_default();
            let fault = faults.iter().find(|(of, _, which)| *of == kind && which.contains(call));
            found = found.or(fault.map(|(_, fault, _)| *fault));
            *call += 1;
        }
        found
    }

    /// The content of every object, by key.
    pub(crate) fn content(&self) -> Vec<(String, Vec<u8>)> {
        block_on(async {
            let mut content = Vec::new();
            for meta in self.objects.list(None).try_collect::<Vec<_>>().await.unwrap() {
                let bytes = self.objects.get(&meta.location).await.unwrap().bytes().await.unwrap();
                content.push((meta.location.to_string(), bytes.to_vec()));
            }
            content.sort();
            content
        })
    }

    pub(crate) fn keys(&self) -> Vec<String> {
        self.content().into_iter().map(|(key, _)| key).collect()
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
}

/// Puts an object there, whatever stands there.
pub(crate) fn put(store: &FaultyStore, key: &str, content: impl Into<Vec<u8>>) {
    let payload = PutPayload::from(content.into());
    block_on(store.objects.put(&Key::parse(key).unwrap(), payload)).unwrap();
}

/// Removes an object.
pub(crate) fn remove(store: &FaultyStore, key: &str) {
    block_on(store.objects.delete(&Key::parse(key).unwrap())).unwrap();
}

fn unavailable() -> Error {
    Error::Generic { store: "test", source: "Server returned non-2xx status code: 503 Service Unavailable: ".into() }
}

fn exists(key: &Key) -> Error {
    Error::AlreadyExists { path: key.to_string(), source: "status code: 412".into() }
}

/// What a fault makes of a request that is not done.
fn refusal(fault: Option<Fault>, key: &Key) -> Option<Error> {
    match fault? {
        Fault::Unavailable | Fault::Dead => Some(unavailable()),
        Fault::Conflict => Some(exists(key)),
        Fault::Denied => Some(Error::PermissionDenied { path: key.to_string(), source: "status code: 403".into() }),
        Fault::LostReply | Fault::LostThenRefused | Fault::IgnoreConditions | Fault::ListsLate => None,
    }
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FaultyStore")
    }
}

impl fmt::Debug for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FaultyStore")
    }
}

#[async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(&self, key: &Key, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let fault = self.fault("put");
        if let Some(error) = refusal(fault, key) {
            return Err(error);
        }
        let is_conditional = matches!(options.mode, PutMode::Create);
        let result = self.objects.put_opts(key, payload, options).await;
        let is_due = |(puts, ..): &mut (usize, Key, Vec<u8>)| *puts <= self.count("put");
        let due = self.replacement.lock().unwrap().take_if(is_due);
        if let Some((_, key, content)) = due {
            self.objects.put(&key, content.into()).await?;
        }
        match fault {
            Some(Fault::LostReply) => Err(unavailable()),
            Some(Fault::LostThenRefused) if is_conditional => Err(exists(key)),
            Some(Fault::LostThenRefused) => Err(unavailable()),
            _ => result,
        }
    }

    async fn put_multipart_opts(&self, _: &Key, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        unimplemented!("a multipart upload is not one conditional request")
    }

    async fn get_opts(&self, key: &Key, mut options: GetOptions) -> Result<GetResult> {
        let fault = self.fault(if options.head { "head" } else { "get" });
        if let Some(error) = refusal(fault, key) {
            return Err(error);
        }
        if fault == Some(Fault::IgnoreConditions) {
            options = GetOptions { if_match: None, if_unmodified_since: None, ..options };
        }
        self.objects.get_opts(key, options).await
    }

    fn delete_stream(&self, keys: BoxStream<'static, Result<Key>>) -> BoxStream<'static, Result<Key>> {
        match refusal(self.fault("delete"), &Key::default()) {
            Some(error) => futures::stream::iter([Err(error)]).boxed(),
            None => self.objects.delete_stream(keys),
        }
    }

    fn list(&self, prefix: Option<&Key>) -> BoxStream<'static, Result<ObjectMeta>> {
        let fault = self.fault("list");
        match (refusal(fault, &Key::default()), fault) {
            (Some(error), _) => futures::stream::iter([Err(error)]).boxed(),
            (None, Some(Fault::ListsLate)) => futures::stream::empty().boxed(),
            _ => self.objects.list(prefix),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Key>) -> Result<ListResult> {
        let fault = self.fault("list");
        match (refusal(fault, &Key::default()), fault) {
            (Some(error), _) => Err(error),
            (None, Some(Fault::ListsLate)) => Ok(ListResult { objects: Vec::new(), common_prefixes: Vec::new() }),
            _ => self.objects.list_with_delimiter(prefix).await,
        }
    }

    async fn copy_opts(&self, from: &Key, to: &Key, options: CopyOptions) -> Result<()> {
        self.objects.copy_opts(from, to, options).await
    }
}
