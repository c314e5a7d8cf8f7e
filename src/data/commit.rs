//! The commit protocol on local files: a file is written under another name beside its place, fsynced, and published
//! without replacing anything. A reader sees a whole file or none, and two writers cannot overwrite each other.
//!
//! ```text
//! write .NAME.tmp-PID-RANDOM -> fsync -> hard link to NAME (else renameat2 RENAME_NOREPLACE) -> fsync the directory
//! ```
//!
//! A failed fsync is never tried again: the kernel may have dropped the pages it could not write, and a second call
//! would then report success for data that is gone.
//!
//! In an object store all of this is one conditional request, sent of a local file without a name.

use std::error::Error as StdError;
use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::store::Location;
use crate::error::{Error, Result, one_line};

/// What became of a file that was to be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// It stands in its place, durably.
    Now,
    /// Another file holds the place; nothing was changed.
    AlreadyThere,
}

/// Moves the fsynced file `temp` to `place`, which must be in the same file system, without ever replacing a file.
///
/// # Errors
/// [`Error::CannotCreate`] where the file system can neither link nor rename without replacing, [`Error::Io`] otherwise.
pub fn publish(temp: &Path, place: &Path) -> Result<Published> {
    match fs::hard_link(temp, place) {
        // A link that stays behind is a dot file of ours, which the next run removes.
        Ok(()) => drop(fs::remove_file(temp)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(Published::AlreadyThere),
        Err(error) if lacks_hard_links(&error) => match rename_without_replacing(temp, place) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Ok(Published::AlreadyThere),
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                return Err(Error::CannotCreate {
                    path: place.to_owned(),
                    message: "this file system supports neither hard links nor renaming without replacing; \
                              choose an --output on another one"
                        .to_owned(),
                });
            }
            Err(errno) => return Err(Error::io("publish", place)(errno.into())),
        },
        Err(error) => return Err(Error::io("publish", place)(error)),
    }
    sync_dir(parent_of(place))?;
    Ok(Published::Now)
}

fn lacks_hard_links(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    // FAT says EPERM; EMLINK is a full inode, which a rename does not need.
    matches!(errno, Some(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS | Errno::MLINK))
}

#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn rename_without_replacing(temp: &Path, place: &Path) -> rustix::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    renameat_with(CWD, temp, CWD, place, RenameFlags::NOREPLACE)
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn rename_without_replacing(_temp: &Path, _place: &Path) -> rustix::io::Result<()> {
    Err(Errno::NOSYS)
}

/// A file that is being written under a temporary name; dropped without [`TempFile::publish`], it is removed.
#[derive(Debug)]
pub struct TempFile {
    file: File,
    path: PathBuf,
    /// Whether it is on its way to an object store: nothing of it has to outlive this process.
    is_scratch: bool,
}

impl TempFile {
    /// Creates `.NAME.tmp-PID-RANDOM` in `dir`, a name that no Parquet reader picks up.
    ///
    /// # Errors
    /// [`Error::CannotCreate`], or [`Error::Io`] on a full disk.
    pub fn create(dir: &Path, name: &str) -> Result<Self> {
        let path = dir.join(format!(".{name}.tmp-{}-{:016x}", std::process::id(), random()));
        let file = File::options().read(true).write(true).create_new(true).open(&path);
        let file = file.map_err(|error| cannot_create(&path, error))?;
        Ok(Self { file, path, is_scratch: false })
    }

    /// A file that will stand in `dir`. For an object store it is made where the system has its temporary files
    /// (`TMPDIR`), and loses its name at once, so that a kill leaves nothing behind.
    ///
    /// # Errors
    /// As [`TempFile::create`].
    pub fn create_in(dir: &Location, name: &str) -> Result<Self> {
        if !dir.is_object() {
            return Self::create(dir.path(), name);
        }
        let mut temp = Self::create(&std::env::temp_dir(), name)?;
        fs::remove_file(&temp.path).map_err(Error::io("remove", &temp.path))?;
        temp.is_scratch = true;
        Ok(temp)
    }

    /// A second handle to write through, for writers that keep theirs and would lose the kind of an I/O error on the way.
    ///
    /// # Errors
    /// [`Error::CannotCreate`] when the system has no more handles.
    pub fn handle(&self) -> Result<File> {
        self.file.try_clone().map_err(|error| cannot_create(&self.path, error))
    }

    /// A reader of what was written, from the beginning on; no more may be written after it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn written(&self) -> Result<File> {
        let mut file = self.handle()?;
        file.rewind().map_err(Error::io("read", &self.path))?;
        Ok(file)
    }

    /// The name under which it is being written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the content durable.
    ///
    /// # Errors
    /// [`Error::Io`]; the file must then be given up.
    pub fn sync(&self) -> Result<()> {
        fault_point("before-fsync");
        if self.is_scratch {
            return Ok(());
        }
        self.file.sync_all().map_err(Error::io("fsync", &self.path))
    }

    /// Makes the content durable and publishes it at `place`.
    ///
    /// # Errors
    /// As [`publish`], [`Error::Io`] when the fsync fails, and [`Error::Store`] when an object store does.
    pub fn publish(self, place: &Location) -> Result<Published> {
        self.sync()?;
        fault_point("before-publish");
        let published = match place.is_object() {
            false => publish(&self.path, place.path())?,
            true if place.put_if_absent(&self.file)? => Published::Now,
            true => Published::AlreadyThere,
        };
        fault_point("after-publish");
        Ok(published)
    }

    /// As [`TempFile::replace`], for any place.
    ///
    /// # Errors
    /// As [`TempFile::replace`], and [`Error::Store`].
    pub fn replace_at(self, place: &Location) -> Result<()> {
        match place.is_object() {
            true => place.put_over(&self.file),
            false => self.replace(place.path()),
        }
    }

    /// Makes the content durable and puts it at `place`, over whatever stands there.
    ///
    /// # Errors
    /// [`Error::Io`] when the fsync or the renaming fails.
    pub fn replace(self, place: &Path) -> Result<()> {
        self.sync()?;
        fs::rename(&self.path, place).map_err(Error::io("rename", place))?;
        sync_dir(parent_of(place))
    }
}

impl Write for TempFile {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.file.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        // Published or renamed, it is gone already; the random name belongs to nobody else.
        if !self.is_scratch {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Whether `name` is one that [`TempFile::create`] gives.
pub fn is_temp_name(name: &str) -> bool {
    let Some((_, ending)) = name.strip_prefix('.').and_then(|rest| rest.rsplit_once(".tmp-")) else { return false };
    ending.split_once('-').is_some_and(|(pid, random)| {
        !pid.is_empty()
            && pid.bytes().all(|byte| byte.is_ascii_digit())
            && random.len() == 16
            && random.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}

/// Creates `path` and its missing parents so that they outlive a power cut.
///
/// # Errors
/// [`Error::CannotCreate`] where that is not allowed or a file is in the way, [`Error::Io`] otherwise.
pub fn create_dirs_durably(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = parent_of(path);
    if parent != path {
        create_dirs_durably(parent)?;
    }
    match fs::create_dir(path) {
        Ok(()) => sync_dir(parent),
        // Another process may have been quicker.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) => Err(cannot_create(path, error)),
    }
}

/// Makes the entries of a directory durable.
///
/// # Errors
/// [`Error::Io`].
pub fn sync_dir(dir: &Path) -> Result<()> {
    let opened = File::open(dir).map_err(Error::io("open", dir))?;
    match opened.sync_all() {
        // Some network file systems cannot fsync a directory, and are durable without.
        Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::INVAL | Errno::OPNOTSUPP)) => Ok(()),
        result => result.map_err(Error::io("fsync", dir)),
    }
}

/// The directory that holds `path`.
pub fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

/// The advisory lock that a run holds on its output directory, until it is dropped or the process ends.
#[derive(Debug)]
pub struct OutputLock {
    _dir: File,
    held: bool,
}

impl OutputLock {
    /// Locks `dir` itself, so that no lock file is left behind.
    ///
    /// # Errors
    /// [`Error::OutputLocked`] when another run holds it, [`Error::Io`] when the directory cannot be opened.
    pub fn acquire(dir: &Path) -> Result<Self> {
        let opened = File::open(dir).map_err(Error::io("open", dir))?;
        let held = match flock(&opened, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => true,
            Err(Errno::WOULDBLOCK) => return Err(Error::OutputLocked { path: dir.to_owned() }),
            // A file system without locks, or NFS, which locks no directory (EBADF): publishing without replacing keeps
            // two runs apart.
            Err(Errno::BADF | Errno::NOTSUP | Errno::NOLCK | Errno::INVAL | Errno::NOSYS) => false,
            Err(errno) => return Err(Error::io("lock", dir)(errno.into())),
        };
        // A run that ended between our open and our lock may have removed its work folder, and a lock on a directory
        // without a name keeps nobody out.
        let ours = opened.metadata().map_err(Error::io("read", dir))?;
        match fs::metadata(dir) {
            Ok(named) if (named.dev(), named.ino()) == (ours.dev(), ours.ino()) => Ok(Self { _dir: opened, held }),
            _ => Err(Error::OutputLocked { path: dir.to_owned() }),
        }
    }

    /// Whether nobody else can be at work here: false on a file system without locks.
    pub fn is_held(&self) -> bool {
        self.held
    }
}

/// The error for an output that cannot be created; a full disk stays an I/O error, since trying again may help.
pub(super) fn cannot_create(path: &Path, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::io("create", path)(error),
        _ => Error::CannotCreate {
            path: path.to_owned(),
            message: format!("cannot be created ({error}); check the path and its permissions"),
        },
    }
}

/// The error for a failed library call that wrote `path`: the I/O error that it wraps, else a bug.
pub(crate) fn write_failed(path: &Path, error: &(dyn StdError + 'static)) -> Error {
    match io_cause(error) {
        Some(source) => Error::io("write", path)(source),
        None => Error::Internal(format!("writing {}: {}", path.display(), one_line(error))),
    }
}

/// The error for a failed library call that read `path`: the I/O error that it wraps, else damage.
pub(super) fn read_failed(path: &Path, error: &(dyn StdError + 'static)) -> Error {
    match io_cause(error) {
        Some(source) if source.kind() != io::ErrorKind::UnexpectedEof => Error::io("read", path)(source),
        _ => Error::corrupt(path, error),
    }
}

/// The operating system's error inside a library's error, so that a full disk is still seen as one.
fn io_cause(error: &(dyn StdError + 'static)) -> Option<io::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        next = match error.downcast_ref::<io::Error>() {
            // `io::Error::source` skips the error that it wraps.
            Some(io) => match io.get_ref().and_then(|wrapped| io_cause(wrapped)) {
                Some(inner) => return Some(inner),
                None => return Some(same_error(io)),
            },
            None => error.source(),
        };
    }
    None
}

fn same_error(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::new(error.kind(), one_line(error)),
    }
}

/// Sixty-four bits that no other process will draw: names of temporary files, nonces.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// What tells one attempt to publish from all others.
pub(super) fn nonce() -> String {
    format!("{:016x}{:016x}", random(), random())
}

/// A test hook: aborts the process here when `MISTRAL_BATCH_FAULT` is `NAME`, or `NAME:N` for the Nth time.
///
/// The names are `before-write`, `after-write`, `before-fsync`, `before-publish`, `after-publish`, `before-success`.
/// The plan, the mark of success and a single file are published like parts, so they reach the points from fsync to
/// publication too: a run's first `before-publish` is that of its plan. Aborting runs no destructor, so the files are
/// left as a kill leaves them.
pub fn fault_point(name: &str) {
    static WANTED: OnceLock<Option<(String, u64)>> = OnceLock::new();
    static REACHED: AtomicU64 = AtomicU64::new(0);
    let wanted = WANTED.get_or_init(|| {
        let value = std::env::var("MISTRAL_BATCH_FAULT").ok()?;
        Some(match value.split_once(':') {
            Some((name, count)) => (name.to_owned(), count.parse().ok()?),
            None => (value, 1),
        })
    });
    if let Some((wanted, count)) = wanted
        && wanted == name
        && REACHED.fetch_add(1, Ordering::Relaxed) + 1 == *count
    {
        std::process::abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::error::ArrowError;
    use parquet::errors::ParquetError;

    #[test]
    fn publishing_never_replaces() {
        let dir = tempfile::tempdir().unwrap();
        let place = Location::from(dir.path().join("part"));
        let mut first = TempFile::create(dir.path(), "part").unwrap();
        first.write_all(b"first").unwrap();
        assert_eq!(first.publish(&place).unwrap(), Published::Now);
        let mut second = TempFile::create(dir.path(), "part").unwrap();
        second.write_all(b"second").unwrap();
        assert_eq!(second.publish(&place).unwrap(), Published::AlreadyThere);
        assert_eq!(fs::read(place.path()).unwrap(), b"first");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays behind");
    }

    #[test]
    fn renaming_never_replaces_either() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        fs::write(&from, "a").unwrap();
        rename_without_replacing(&from, &to).unwrap();
        fs::write(&from, "again").unwrap();
        assert_eq!(rename_without_replacing(&from, &to), Err(Errno::EXIST));
        assert_eq!(fs::read(&to).unwrap(), b"a");
    }

    #[test]
    fn file_systems_without_hard_links_are_recognised() {
        for errno in [Errno::PERM, Errno::OPNOTSUPP, Errno::MLINK] {
            assert!(lacks_hard_links(&errno.into()), "{errno}");
        }
        for errno in [Errno::XDEV, Errno::NOSPC, Errno::ACCESS] {
            assert!(!lacks_hard_links(&errno.into()), "{errno}");
        }
    }

    #[test]
    fn a_second_lock_is_refused_until_the_first_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let first = OutputLock::acquire(dir.path()).unwrap();
        assert!(first.is_held());
        assert!(matches!(OutputLock::acquire(dir.path()), Err(Error::OutputLocked { .. })));
        drop(first);
        OutputLock::acquire(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "no lock file");
    }

    #[test]
    fn directories_are_created_and_files_in_the_way_are_named() {
        let dir = tempfile::tempdir().unwrap();
        create_dirs_durably(&dir.path().join("a/b/c")).unwrap();
        create_dirs_durably(&dir.path().join("a/b/c")).unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let error = create_dirs_durably(&dir.path().join("file/x")).unwrap_err();
        assert!(matches!(&error, Error::CannotCreate { path, .. } if path.ends_with("file")), "{error}");
    }

    #[test]
    fn temporary_names_are_told_from_others() {
        let dir = tempfile::tempdir().unwrap();
        let temp = TempFile::create(dir.path(), "part-000000.parquet").unwrap();
        assert!(is_temp_name(temp.path().file_name().unwrap().to_str().unwrap()));
        for other in [".part-000000.parquet", "a.tmp-1-0123456789abcdef", ".a.tmp-x-0123456789abcdef", ".a.tmp-1-x"] {
            assert!(!is_temp_name(other), "{other}");
        }
    }

    #[test]
    fn a_full_disk_is_seen_through_the_libraries_errors() {
        let full = || io::Error::from_raw_os_error(Errno::NOSPC.raw_os_error());
        let wrapped: [Box<dyn StdError + Send + Sync>; 4] = [
            Box::new(ParquetError::from(full())),
            Box::new(ArrowError::from(full())),
            Box::new(ParquetError::from(ArrowError::from(full()))),
            Box::new(io::Error::other(ParquetError::from(full()))),
        ];
        for error in wrapped {
            let mapped = write_failed(Path::new("part"), error.as_ref());
            assert!(
                matches!(&mapped, Error::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull),
                "{mapped}"
            );
        }
        let bug = write_failed(Path::new("part"), &ParquetError::General("x".to_owned()));
        assert!(matches!(bug, Error::Internal(_)));
        assert_eq!(cannot_create(Path::new("part"), full()).exit_code(), crate::ExitCode::Io);
    }
}
