//! Where bytes are: local files, and objects of S3-compatible, Google and Azure stores.
//!
//! A [`Location`] is either. Readers take a [`StoredFile`], a location as it was when it was first looked at; what was
//! planned is what is read, or the read fails. Objects are published by one conditional request, so that they are there
//! whole or not at all, and never replaced. [`Stores`] makes clients of URLs, and is the only place that knows which are
//! built in: all else is the same in every build, and tested with stores in memory.

mod location;
mod object;
mod reader;
mod stores;
#[cfg(test)]
pub(crate) mod testing;

pub use location::{Entry, Identity, Location, StoredFile};
pub use object::{MAX_PUT_BYTES, Object};
pub(crate) use object::{concurrently, failure};
pub use reader::Reader;
pub use stores::Stores;
