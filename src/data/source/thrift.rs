//! Thrift's compact protocol, walked only far enough to see what a Parquet file claims before a decoder allocates it.
//!
//! The decoder trusts the sizes that it reads: a list of two thousand million row groups, a schema nested deeper than the stack,
//! a page that unpacks to 2 GiB. None of it has to be there for the allocation, or the recursion, to end the process.

use std::io::{self, Read};

/// Structs, lists and maps inside each other: the deepest that Parquet defines has six.
const MAX_DEPTH: usize = 32;

/// What a walk meets inside the outermost struct, with the ids of the fields that lead there; list entries have none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// A field that is an integer.
    Integer(i64),
    /// A field that is a truth value.
    Truth(bool),
    /// The end of a struct.
    End,
}

/// Walks one struct of at most `limit` bytes and tells `visit` what is in it.
///
/// # Errors
///
/// What `visit` refuses, what `input` fails with, and [`io::ErrorKind::InvalidData`] for what is no such struct, nests too deep
/// or holds a length beyond `limit`.
pub(super) fn walk(
    input: impl Read,
    limit: u64,
    visit: &mut dyn FnMut(&[i16], Event) -> io::Result<()>,
) -> io::Result<()> {
    Walker { input, left: limit, path: Vec::new(), visit }.fields(0)
}

struct Walker<'a, R> {
    input: R,
    /// Bytes that may still be read.
    left: u64,
    path: Vec<i16>,
    visit: &'a mut dyn FnMut(&[i16], Event) -> io::Result<()>,
}

/// A field's type as its header has it.
mod kind {
    pub const STOP: u8 = 0;
    pub const TRUE: u8 = 1;
    pub const FALSE: u8 = 2;
    pub const BYTE: u8 = 3;
    pub const I16: u8 = 4;
    pub const I32: u8 = 5;
    pub const I64: u8 = 6;
    pub const DOUBLE: u8 = 7;
    pub const BINARY: u8 = 8;
    pub const LIST: u8 = 9;
    pub const SET: u8 = 10;
    pub const MAP: u8 = 11;
    pub const STRUCT: u8 = 12;
}

impl<R: Read> Walker<'_, R> {
    fn fields(&mut self, depth: usize) -> io::Result<()> {
        if depth > MAX_DEPTH {
            return Err(invalid("its metadata is nested too deep"));
        }
        let mut id = 0i16;
        loop {
            let header = self.byte()?;
            let (delta, kind) = (header >> 4, header & 0x0f);
            if kind == kind::STOP {
                return (self.visit)(&self.path, Event::End);
            }
            id = match delta {
                0 => self.integer()? as i16,
                delta => id.wrapping_add(i16::from(delta)),
            };
            self.path.push(id);
            match kind {
                // A field's truth stands in its header; an entry's is a byte.
                kind::TRUE | kind::FALSE => (self.visit)(&self.path, Event::Truth(kind == kind::TRUE))?,
                kind => self.value(kind, depth)?,
            }
            self.path.pop();
        }
    }

    fn value(&mut self, kind: u8, depth: usize) -> io::Result<()> {
        match kind {
            kind::TRUE | kind::FALSE => self.byte().map(drop),
            kind::BYTE => {
                let value = i64::from(self.byte()? as i8);
                (self.visit)(&self.path, Event::Integer(value))
            }
            kind::I16 | kind::I32 | kind::I64 => {
                let value = self.integer()?;
                (self.visit)(&self.path, Event::Integer(value))
            }
            kind::DOUBLE => self.skip(8),
            kind::BINARY => {
                let length = self.length()?;
                self.skip(length)
            }
            kind::LIST | kind::SET => {
                let header = self.byte()?;
                let size = match header >> 4 {
                    15 => self.length()?,
                    size => u64::from(size),
                };
                self.entries(size, &[header & 0x0f], depth)
            }
            kind::MAP => match self.length()? {
                0 => Ok(()),
                size => {
                    let kinds = self.byte()?;
                    self.entries(size, &[kinds >> 4, kinds & 0x0f], depth)
                }
            },
            kind::STRUCT => self.fields(depth + 1),
            other => Err(invalid(format!("its metadata has a field of the unknown type {other}"))),
        }
    }

    fn entries(&mut self, size: u64, kinds: &[u8], depth: usize) -> io::Result<()> {
        if depth >= MAX_DEPTH {
            return Err(invalid("its metadata is nested too deep"));
        }
        if size > self.left {
            return Err(invalid(format!("its metadata has a list of {size} entries, more than there are bytes")));
        }
        for _ in 0..size {
            for &kind in kinds {
                self.value(kind, depth + 1)?;
            }
        }
        Ok(())
    }

    fn byte(&mut self) -> io::Result<u8> {
        let mut byte = [0];
        self.left = self.left.checked_sub(1).ok_or_else(|| invalid("its metadata goes on beyond its end"))?;
        self.input.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        self.left = self.left.checked_sub(bytes).ok_or_else(|| invalid("its metadata goes on beyond its end"))?;
        match io::copy(&mut self.input.by_ref().take(bytes), &mut io::sink())? {
            copied if copied == bytes => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn varint(&mut self) -> io::Result<u64> {
        varint(|| self.byte())
    }

    fn length(&mut self) -> io::Result<u64> {
        self.varint()
    }

    /// A signed number; 0, -1, 1, -2 are 0, 1, 2, 3.
    fn integer(&mut self) -> io::Result<i64> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }
}

/// A number of seven bits a byte, the lowest first.
pub(super) fn varint(mut byte: impl FnMut() -> io::Result<u8>) -> io::Result<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = byte()?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(invalid("its metadata has a number that never ends"))
}

/// [`io::ErrorKind::InvalidData`], which tells damage from a failing disk.
pub(super) fn invalid(message: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(bytes: &[u8]) -> io::Result<Vec<(Vec<i16>, Event)>> {
        let mut events = Vec::new();
        walk(bytes, bytes.len() as u64, &mut |path, event| {
            events.push((path.to_vec(), event));
            Ok(())
        })?;
        Ok(events)
    }

    #[test]
    fn integers_are_met_with_the_fields_that_lead_there() {
        // {1: -3, 3: true, 4: "ab", 5: [{2: 7}, {}], 100: 1.0, 101: {byte: byte}}
        let bytes = [
            0x15, 5, 0x21, 0x18, 2, b'a', b'b', 0x19, 0x2c, 0x25, 14, 0, 0, 0x07, 200, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0x1b,
            1, 0x33, 1, 2, 0,
        ];
        let integer = |path: &[i16], value| (path.to_vec(), Event::Integer(value));
        assert_eq!(
            events(&bytes).unwrap(),
            [
                integer(&[1], -3),
                (vec![3], Event::Truth(true)),
                integer(&[5, 2], 7),
                (vec![5], Event::End),
                (vec![5], Event::End),
                integer(&[101], 1),
                integer(&[101], 2),
                (vec![], Event::End)
            ]
        );
        for length in 0..bytes.len() {
            assert!(events(&bytes[..length]).is_err(), "cut after {length}");
        }
    }

    #[test]
    fn what_is_claimed_and_cannot_be_there_is_refused() {
        let says = |bytes: &[u8]| events(bytes).unwrap_err().to_string();
        assert!(says(&[0x19, 0xfc, 0xff, 0xff, 0xff, 0xff, 7, 0]).contains("2147483647 entries"));
        assert!(says(&[0x18, 0xff, 0xff, 0xff, 0xff, 7, 0]).contains("beyond its end"));
        assert!(says(&[0x15, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]).contains("never ends"));
        assert!(says(&[0x1c; 100]).contains("nested too deep"));
        assert!(says(&[0x19; 100]).contains("nested too deep"));
        assert!(says(&[0x1e, 0]).contains("unknown type 14"));
    }
}
