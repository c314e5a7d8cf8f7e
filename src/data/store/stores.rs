//! From URLs to clients of object stores.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreScheme};
use url::Url;

use super::location::Location;
use super::object::{IoThreads, Object};
use crate::error::{Error, Result, one_line};

/// Schemes whose URLs are `scheme://bucket/key`, the key being as the store has it.
const SCHEMES: [&str; 8] = ["s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss"];

/// The object stores that a job reads and writes; each is connected to once.
///
/// Credentials, endpoints and regions come from the environment. A library may bring its own clients, with
/// [`Stores::with_store`].
#[derive(Clone, Default)]
pub struct Stores {
    connected: Arc<Mutex<HashMap<String, Arc<dyn ObjectStore>>>>,
    io: Arc<IoThreads>,
}

impl fmt::Debug for Stores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let connected = self.connected.lock().unwrap_or_else(PoisonError::into_inner);
        f.debug_set().entries(connected.keys()).finish()
    }
}

impl Stores {
    /// The same, with `store` behind the URLs that begin with `base`, as `s3://bucket`.
    pub fn with_store(self, base: &str, store: Arc<dyn ObjectStore>) -> Self {
        let base = base.trim_end_matches('/').to_owned();
        self.connected.lock().unwrap_or_else(PoisonError::into_inner).insert(base, store);
        self
    }

    /// Where `text` is: an object for a URL of an object store, a local file for everything else.
    ///
    /// # Errors
    /// [`Error::Usage`] for other URLs, and for stores that this build does not have.
    pub fn locate(&self, text: &str) -> Result<Location> {
        if !text.contains("://") {
            return Ok(Location::from(PathBuf::from(text)));
        }
        let StoreUrl { base, key } = StoreUrl::parse(text)?;
        let mut connected = self.connected.lock().unwrap_or_else(PoisonError::into_inner);
        let store = match connected.get(&base) {
            Some(store) => Arc::clone(store),
            None => {
                let store = connect(&base)?;
                connected.insert(base.clone(), Arc::clone(&store));
                store
            }
        };
        Ok(Location::named(text, Object::new(store, base.into(), key, Arc::clone(&self.io))))
    }
}

/// An address, taken apart.
#[derive(Debug, PartialEq, Eq)]
struct StoreUrl {
    /// What one client serves, as `s3://bucket`.
    base: String,
    key: Key,
}

impl StoreUrl {
    fn parse(text: &str) -> Result<Self> {
        let wrong = |message: String| Error::Usage(format!("{text}: {message}"));
        let (scheme, rest) = text.split_once("://").unwrap_or((text, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let known = || {
            let names: Vec<String> = SCHEMES.iter().map(|scheme| format!("{scheme}://")).collect();
            format!("{}, and https:// of Amazon S3, Azure and R2", names.join(", "))
        };
        match scheme {
            "file" => Err(wrong("give the path alone, without file://".to_owned())),
            _ if SCHEMES.contains(&scheme) => {
                if authority.is_empty() {
                    return Err(wrong(format!("the bucket is missing: {scheme}://BUCKET/KEY")));
                }
                if authority.contains(':') {
                    return Err(wrong("credentials do not belong into a URL; give them in the environment".to_owned()));
                }
                let key = Key::parse(path).map_err(|error| wrong(one_line(error)))?;
                Ok(Self { base: format!("{scheme}://{authority}"), key })
            }
            "https" => {
                let url = Url::parse(text).map_err(|error| wrong(one_line(error)))?;
                if url.query().is_some() || url.password().is_some() {
                    return Err(wrong("credentials do not belong into a URL; give them in the environment".to_owned()));
                }
                let (scheme, key) = ObjectStoreScheme::parse(&url).map_err(|error| wrong(one_line(error)))?;
                if !matches!(scheme, ObjectStoreScheme::AmazonS3 | ObjectStoreScheme::MicrosoftAzure) {
                    return Err(wrong(format!("not the address of an object store; known are {}", known())));
                }
                // Where the bucket is a part of the path, the key is shorter than the path.
                let whole = Key::from_url_path(url.path()).map_err(|error| wrong(one_line(error)))?;
                let bucket = match whole.parts_count() > key.parts_count() {
                    true => format!("/{}", url.path().trim_start_matches('/').split('/').next().unwrap_or_default()),
                    false => String::new(),
                };
                Ok(Self { base: format!("https://{authority}{bucket}"), key })
            }
            _ => Err(wrong(format!("no object store has such an address; known are {}", known()))),
        }
    }
}

/// Makes the client of a store, from what the environment says.
#[cfg(feature = "cloud")]
fn connect(base: &str) -> Result<Arc<dyn ObjectStore>> {
    use object_store::ClientConfigKey::Timeout;
    use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
    use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
    use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};

    /// The client's own 30 s, headers and body together, are too short for parts of gigabytes.
    const REQUEST_TIMEOUT: &str = "5m";
    let failed = |error: object_store::Error| Error::Usage(format!("{base}: {}", one_line(error)));
    let wants_timeout = |variable: &str| std::env::var_os(variable).is_none();
    let url = Url::parse(base).map_err(|error| Error::Usage(format!("{base}: {}", one_line(error))))?;
    let (scheme, _) =
        ObjectStoreScheme::parse(&url).map_err(|error| Error::Usage(format!("{base}: {}", one_line(error))))?;
    match scheme {
        ObjectStoreScheme::AmazonS3 => {
            let mut builder = AmazonS3Builder::from_env().with_url(base);
            if wants_timeout("AWS_TIMEOUT") {
                builder = builder.with_config(AmazonS3ConfigKey::Client(Timeout), REQUEST_TIMEOUT);
            }
            Ok(Arc::new(builder.build().map_err(failed)?))
        }
        ObjectStoreScheme::GoogleCloudStorage => {
            let mut builder = GoogleCloudStorageBuilder::from_env().with_url(base);
            if wants_timeout("GOOGLE_TIMEOUT") {
                builder = builder.with_config(GoogleConfigKey::Client(Timeout), REQUEST_TIMEOUT);
            }
            Ok(Arc::new(builder.build().map_err(failed)?))
        }
        _ => {
            let mut builder = MicrosoftAzureBuilder::from_env().with_url(base);
            if wants_timeout("AZURE_TIMEOUT") {
                builder = builder.with_config(AzureConfigKey::Client(Timeout), REQUEST_TIMEOUT);
            }
            Ok(Arc::new(builder.build().map_err(failed)?))
        }
    }
}

#[cfg(not(feature = "cloud"))]
fn connect(base: &str) -> Result<Arc<dyn ObjectStore>> {
    Err(Error::Usage(format!(
        "{base}: this build has no object stores; make one that has them with `cargo build --release --features cloud`, \
         or copy the files to a disk"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ExitCode;

    #[test]
    fn addresses_are_taken_apart() {
        for (url, base, key) in [
            ("s3://bucket/a/b.parquet", "s3://bucket", "a/b.parquet"),
            ("s3://bucket", "s3://bucket", ""),
            ("gs://bucket/day=1/part 1 %20.csv", "gs://bucket", "day=1/part 1 %20.csv"),
            ("az://container@account/x?/[1]*", "az://container@account", "x?/[1]*"),
            ("abfss://fs@account.dfs.core.windows.net/a/", "abfss://fs@account.dfs.core.windows.net", "a"),
            ("https://account.blob.core.windows.net/c/a%20b", "https://account.blob.core.windows.net/c", "a b"),
            ("https://b.s3.eu-west-1.amazonaws.com/a/b", "https://b.s3.eu-west-1.amazonaws.com", "a/b"),
            ("https://s3.eu-west-1.amazonaws.com/b/a", "https://s3.eu-west-1.amazonaws.com/b", "a"),
        ] {
            let parsed = StoreUrl::parse(url).unwrap();
            assert_eq!((parsed.base.as_str(), parsed.key.as_ref()), (base, key), "{url}");
        }
        for (url, says) in [
            ("file:///tmp/x", "without file://"),
            ("s3:///x", "bucket is missing"),
            ("s3://key:secret@bucket/x", "environment"),
            ("https://a.blob.core.windows.net/c/x?sv=1", "environment"),
            ("https://example.com/x.parquet", "known are s3://"),
            ("ftp://host/x", "known are s3://"),
            ("s3://bucket/a//b", "empty"),
        ] {
            let error = StoreUrl::parse(url).unwrap_err();
            assert!(error.exit_code() == ExitCode::Usage && error.to_string().contains(says), "{error}");
        }
    }

    #[test]
    fn what_is_no_url_is_local() {
        let location = Stores::default().locate("a/b.parquet").unwrap();
        assert!(!location.is_object());
    }

    #[cfg(not(feature = "cloud"))]
    #[test]
    fn a_build_without_stores_says_how_to_get_one_with_them() {
        let error = Stores::default().locate("s3://bucket/a.parquet").unwrap_err();
        assert!(error.to_string().contains("--features cloud"), "{error}");
    }
}
