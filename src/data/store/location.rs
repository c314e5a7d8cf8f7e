//! A file or a folder, wherever it is, and a file as it was when it was first looked at.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::UNIX_EPOCH;

use bytes::Bytes;
use object_store::path::PathPart;
use object_store::{ObjectMeta, PutPayload};
use serde::{Deserialize, Serialize};

use super::object::{Answer, Children, MAX_PUT_BYTES, Object};
use super::reader::Reader;
use crate::error::{Error, Result, StoreFailure, StoreFailureKind};

/// A path of the local file system, or the address of an object or of a prefix of objects.
#[derive(Debug, Clone)]
pub struct Location {
    path: PathBuf,
    object: Option<Object>,
}

impl PartialEq for Location {
    fn eq(&self, other: &Self) -> bool {
        self.path == other.path && self.is_object() == other.is_object()
    }
}

impl Eq for Location {}

impl From<PathBuf> for Location {
    /// A path of the local file system, whatever it looks like.
    fn from(path: PathBuf) -> Self {
        Self { path, object: None }
    }
}

impl From<&Path> for Location {
    /// As of a [`PathBuf`].
    fn from(path: &Path) -> Self {
        path.to_owned().into()
    }
}

/// What stands right below a folder.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Where it is.
    pub location: Location,
    /// Its name in the folder.
    pub name: String,
    /// What the listing told of an object; `None` for folders and local files.
    pub identity: Option<Identity>,
}

impl Location {
    /// An object, under the URL that the user wrote.
    pub(super) fn named(url: &str, object: Object) -> Self {
        Self { path: url.into(), object: Some(object) }
    }

    /// An object, under its own URL.
    pub(crate) fn at(object: Object) -> Self {
        Self { path: object.url().into(), object: Some(object) }
    }

    /// The path or the URL, as messages and plans name it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The object, where this is in a store.
    pub fn object(&self) -> Option<&Object> {
        self.object.as_ref()
    }

    /// Whether this is in an object store.
    pub fn is_object(&self) -> bool {
        self.object.is_some()
    }

    /// The last part of the path.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// What has this name in this folder.
    pub fn join(&self, name: &str) -> Self {
        match &self.object {
            Some(object) => Self::at(object.with_key(object.key().clone().join(part(name)))),
            None => self.path.join(name).into(),
        }
    }

    /// What has this name in the same folder.
    pub fn with_name(&self, name: &str) -> Self {
        match &self.object {
            Some(object) => {
                let folder = object.key().parent().unwrap_or_default();
                Self::at(object.with_key(folder.join(part(name))))
            }
            None => self.path.with_file_name(name).into(),
        }
    }

    /// Whether this is a folder: a directory, or a prefix with objects below it.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn is_folder(&self) -> Result<bool> {
        match &self.object {
            None => Ok(self.path.is_dir()),
            Some(object) => self.answered("list", object.is_prefix()),
        }
    }

    /// The file as it is now; `None` where there is none.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Store`].
    pub fn file(&self) -> Result<Option<StoredFile>> {
        let identity = match &self.object {
            Some(object) => self.answered("read", object.head())?,
            None => match Identity::of_file(&self.path) {
                Ok(identity) => Some(identity),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(Error::io("read", &self.path)(error)),
            },
        };
        Ok(identity.map(|identity| StoredFile::new(self.clone(), identity)))
    }

    /// The content of a small file; `None` where there is none.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Store`].
    pub fn read(&self) -> Result<Option<Bytes>> {
        match &self.object {
            Some(object) => self.answered("read", object.read()),
            None => match fs::read(&self.path) {
                Ok(bytes) => Ok(Some(bytes.into())),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(Error::io("read", &self.path)(error)),
            },
        }
    }

    /// Removes the file, if it is there.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Store`].
    pub fn remove(&self) -> Result<()> {
        match &self.object {
            Some(object) => self.answered("remove", object.remove()),
            None => match fs::remove_file(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &self.path)(error)),
                _ => Ok(()),
            },
        }
    }

    /// What stands right below this folder, by name; nothing where there is no folder.
    ///
    /// # Errors
    /// [`Error::Io`], of the kind [`io::ErrorKind::NotADirectory`] where this is a file, and [`Error::Store`].
    pub fn entries(&self) -> Result<Vec<Entry>> {
        let mut entries: Vec<Entry> = Vec::new();
        match &self.object {
            Some(object) => {
                let Children { objects, prefixes } = self.answered("list", object.children())?;
                let entry = |name: Option<&str>, identity| {
                    let name = name.unwrap_or_default().to_owned();
                    Entry { location: self.join(&name), name, identity }
                };
                entries.extend(prefixes.iter().map(|prefix| entry(prefix.filename(), None)));
                entries.extend(
                    objects.into_iter().map(|(object, identity)| entry(object.key().filename(), Some(identity))),
                );
            }
            None => {
                let failed = || Error::io("read", &self.path);
                let listed = match fs::read_dir(&self.path) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(entries),
                    listed => listed.map_err(failed())?,
                };
                for entry in listed {
                    let path = entry.map_err(failed())?.path();
                    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    entries.push(Entry { location: path.into(), name, identity: None });
                }
            }
        }
        entries.sort_by(|a, b| a.location.path.cmp(&b.location.path));
        Ok(entries)
    }

    /// Puts the content of `file` where there is no object, and tells whether it is there because of that.
    ///
    /// # Errors
    /// As [`Object::put_if_absent`]; [`Error::CannotCreate`] where the store has no such bucket, knows no conditional
    /// requests, or takes no object of this size.
    pub(crate) fn put_if_absent(&self, file: &File) -> Result<bool> {
        let object = self.object_to_write()?;
        self.put(|payload| object.put_if_absent(payload), file)
    }

    /// Puts the content of `file` in this place, whatever object stands there.
    ///
    /// # Errors
    /// As [`Location::put_if_absent`].
    pub(crate) fn put_over(&self, file: &File) -> Result<()> {
        let object = self.object_to_write()?;
        self.put(|payload| object.put_over(payload), file)
    }

    fn object_to_write(&self) -> Result<&Object> {
        self.object.as_ref().ok_or_else(|| Error::Internal(format!("{} is no object", self.path.display())))
    }

    fn put<T>(&self, send: impl FnOnce(PutPayload) -> Answer<T>, file: &File) -> Result<T> {
        let payload = payload(file).map_err(Error::io("read", &self.path))?;
        let cannot = |message: String| Error::CannotCreate { path: self.path.clone(), message };
        if payload.content_length() as u64 > MAX_PUT_BYTES {
            return Err(cannot(format!(
                "has {} bytes, and one request can store {MAX_PUT_BYTES}; write a folder of parts, with fewer --unit-rows",
                payload.content_length()
            )));
        }
        send(payload).map_err(|failure| match failure.kind {
            StoreFailureKind::Missing | StoreFailureKind::Unsupported => cannot(failure.to_string()),
            _ => self.failed("write", failure),
        })
    }

    pub(crate) fn answered<T>(&self, action: &'static str, answer: Answer<T>) -> Result<T> {
        answer.map_err(|failure| self.failed(action, failure))
    }

    fn failed(&self, action: &'static str, failure: StoreFailure) -> Error {
        match failure.kind {
            StoreFailureKind::Changed => Error::InputChanged { path: self.path.clone(), message: failure.message },
            _ => Error::Store { action, path: self.path.clone(), failure },
        }
    }
}

/// A name as a part of a key. One from a listing stands for itself: encoding it again would make another object of it.
fn part(name: &str) -> PathPart<'_> {
    PathPart::parse(name).unwrap_or_else(|_| PathPart::from(name))
}

/// The file's content as it is in memory pages of the file itself, however long it is.
fn payload(file: &File) -> io::Result<PutPayload> {
    if file.metadata()?.len() == 0 {
        return Ok(PutPayload::new());
    }
    // SAFETY: the file is one that this process made under a random name and has finished writing.
    let pages = unsafe { memmap2::Mmap::map(file)? };
    Ok(Bytes::from_owner(pages).into())
}

/// What tells one version of a file from the next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its size.
    pub size_bytes: u64,
    /// When it was last modified, in nanoseconds since 1970; not of an object with an etag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modified_ns: Option<i64>,
    /// The etag of an object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
}

impl Identity {
    fn of_file(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        let modified = metadata.modified()?;
        let nanoseconds = match modified.duration_since(UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
            Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |before| -before),
        };
        Ok(Self { size_bytes: metadata.len(), modified_ns: Some(nanoseconds), etag: None })
    }

    pub(super) fn of_object(meta: &ObjectMeta) -> Self {
        let etag = meta.e_tag.as_deref().map(quoted);
        let modified_ns = if etag.is_some() { None } else { meta.last_modified.timestamp_nanos_opt() };
        Self { size_bytes: meta.size, modified_ns, etag }
    }

    /// How `now` differs, if it does.
    pub(super) fn difference(&self, now: &Identity) -> Option<String> {
        if now.size_bytes != self.size_bytes {
            return Some(format!("it had {} bytes, now {}", self.size_bytes, now.size_bytes));
        }
        (now != self).then(|| "it was written to".to_owned())
    }
}

/// An etag as HTTP's headers have it. Azure's, a number in hexadecimal, stand in quotes in every reply but in its listings.
fn quoted(etag: &str) -> String {
    if etag.starts_with("0x") { format!("\"{etag}\"") } else { etag.to_owned() }
}

/// A file as it was when it was first looked at.
#[derive(Debug, Clone)]
pub struct StoredFile {
    location: Location,
    identity: Identity,
    failure: Arc<FailureSlot>,
}

/// The failure of a store that a reader met: decoders make texts of the errors that pass through them.
#[derive(Debug, Default)]
pub(super) struct FailureSlot(Mutex<Option<StoreFailure>>);

impl FailureSlot {
    pub(super) fn keep(&self, failure: StoreFailure) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
    }

    fn take(&self) -> Option<StoreFailure> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl StoredFile {
    pub(crate) fn new(location: Location, identity: Identity) -> Self {
        Self { location, identity, failure: Arc::default() }
    }

    /// Where it is.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// The path or the URL.
    pub fn path(&self) -> &Path {
        self.location.path()
    }

    /// Which version of the file this is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Its size.
    pub fn size_bytes(&self) -> u64 {
        self.identity.size_bytes
    }

    /// A reader from the beginning on. Of an object it reads this version or fails.
    ///
    /// # Errors
    /// [`Error::Io`] where a local file cannot be opened.
    pub fn open(&self) -> Result<Reader> {
        match self.location.object() {
            Some(object) => Ok(Reader::of_object(object.clone(), self.identity.clone(), Arc::clone(&self.failure))),
            None => File::open(self.path()).map(Reader::Local).map_err(Error::io("open", self.path())),
        }
    }

    /// `error`, or the failure of the store that is behind it.
    pub fn explain(&self, error: Error) -> Error {
        self.check().err().unwrap_or(error)
    }

    /// Tells of the failure of the store that a reader of this met, if any.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::InputChanged`].
    pub fn check(&self) -> Result<()> {
        match self.failure.take() {
            None => Ok(()),
            // It was there when it was first looked at.
            Some(StoreFailure { kind: StoreFailureKind::Missing, .. }) => {
                Err(Error::InputChanged { path: self.path().to_owned(), message: "it is gone".to_owned() })
            }
            Some(failure) => Err(self.location.failed("read", failure)),
        }
    }

    /// Checks that this is still the version that is there.
    ///
    /// # Errors
    /// [`Error::InputChanged`] where it is not, or the file is gone.
    pub fn verify_unchanged(&self) -> Result<()> {
        let now = self.location.file()?;
        let difference = match now {
            None => Some("it is gone".to_owned()),
            Some(now) => self.identity.difference(&now.identity),
        };
        match difference {
            Some(message) => Err(Error::InputChanged { path: self.path().to_owned(), message }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use object_store::path::Path as Key;

    use super::*;

    #[test]
    fn an_object_of_azures_listings_is_that_of_its_other_replies() {
        let identity = |etag: &str| {
            let meta = ObjectMeta {
                location: Key::from("key"),
                last_modified: Default::default(),
                size: 3,
                e_tag: Some(etag.to_owned()),
                version: None,
            };
            Identity::of_object(&meta)
        };
        let (listed, asked) = (identity("0x8DD2A"), identity("\"0x8DD2A\""));
        assert_eq!((listed.difference(&asked), listed.etag.as_deref()), (None, Some("\"0x8DD2A\"")));
        assert!(listed.difference(&identity("0x8DD2B")).is_some());
        assert_eq!(identity("W/\"a\"").etag.as_deref(), Some("W/\"a\""));
    }
}
