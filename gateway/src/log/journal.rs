//! [`Journal`]: one gateway's file of framed records, to which it appends.
//!
//! A file begins with a magic word; a frame is the length and the CRC-32 of its payload, little-endian, then the payload.
//! A frame that was cut off by a failure of power or a full disk is the last one and is not read; a write that fails is
//! cut off again.
//!
//! Who holds the file's lock owns it. A file gets its final name only when it is locked, and a rewritten one is locked
//! before it takes the old one's name, so a lock on a file that still has its name is a lock on the log.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What a file of this version begins with.
const MAGIC: [u8; 8] = *b"SPATLOG1";

/// Bytes before a frame's payload.
const FRAME_HEADER: u64 = 8;

/// Largest payload: a session's prompt, or a few thousand tokens with log-probabilities.
const MAX_PAYLOAD: usize = 16 << 20;

/// Ending of a log's name, and of one that is being made.
const LOG: &str = "log";
const UNFINISHED: &str = "tmp";

/// An open, locked file.
pub(super) struct Journal {
    file: File,
    path: PathBuf,
    len: u64,
}

/// Adds a frame to `buffer`.
pub(super) fn frame(payload: &[u8], buffer: &mut Vec<u8>) -> io::Result<()> {
    if payload.len() > MAX_PAYLOAD {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the record is too large",
        ));
    }
    // At most 16 MiB.
    buffer.extend((payload.len() as u32).to_le_bytes());
    buffer.extend(crc32fast::hash(payload).to_le_bytes());
    buffer.extend(payload);
    Ok(())
}

/// Whether a write failed because there is no room, which may come back.
pub(super) fn is_for_want_of_room(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}

impl Journal {
    /// A new file in `dir` under a name of its own; none is left behind where that fails.
    pub(super) fn create(dir: &Path) -> io::Result<Self> {
        let name = format!("gateway-{:016x}", rand::random::<u64>());
        let path = dir.join(name).with_extension(LOG);
        let made = Self::unfinished(path.clone()).and_then(|journal| {
            journal.publish()?;
            Ok(journal)
        });
        if made.is_err() {
            // What cannot be removed either is found by whoever next takes over abandoned files.
            let _ = std::fs::remove_file(path.with_extension(UNFINISHED));
        }
        made
    }

    /// A new, locked file that has yet to take the name `path`.
    fn unfinished(path: PathBuf) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path.with_extension(UNFINISHED))?;
        file.lock()?;
        let mut journal = Self { file, path, len: 0 };
        journal.append(&MAGIC)?;
        Ok(journal)
    }

    /// Takes its name, in place of whatever has it.
    fn publish(&self) -> io::Result<()> {
        std::fs::rename(self.path.with_extension(UNFINISHED), &self.path)?;
        // The name is as durable as the content.
        match self.path.parent() {
            Some(dir) => File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    }

    /// The files in `dir` that nobody owns; they are owned now.
    pub(super) fn abandoned(dir: &Path) -> io::Result<Vec<Self>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            let extension = path.extension().and_then(OsStr::to_str);
            if !matches!(extension, Some(LOG | UNFINISHED)) {
                continue;
            }
            let Some(journal) = Self::take(&path)? else {
                continue;
            };
            if extension == Some(UNFINISHED) {
                // Its gateway died while making it: what it was made from is still there.
                std::fs::remove_file(&path)?;
            } else {
                found.push(journal);
            }
        }
        Ok(found)
    }

    /// Opens and locks a file; `None` when it has an owner or is gone.
    fn take(path: &Path) -> io::Result<Option<Self>> {
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        let locked = file.metadata()?;
        let named = match std::fs::metadata(path) {
            Ok(named) => named,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if (locked.dev(), locked.ino()) != (named.dev(), named.ino()) {
            return Ok(None);
        }
        Ok(Some(Self {
            len: locked.len(),
            file,
            path: path.to_owned(),
        }))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Appends bytes, frames as a rule; gives the place of the first.
    ///
    /// # Errors
    /// When not all could be written; the file holds what it held before.
    pub(super) fn append(&mut self, bytes: &[u8]) -> io::Result<u64> {
        let at = self.len;
        if let Err(error) = self.file.write_all_at(bytes, at) {
            // Even where this fails too, the next append overwrites what was left.
            let _ = self.file.set_len(at);
            return Err(error);
        }
        self.len += bytes.len() as u64;
        Ok(at)
    }

    /// Forgets everything from `len` on.
    pub(super) fn truncate(&mut self, len: u64) {
        self.len = self.len.min(len);
        let _ = self.file.set_len(self.len);
    }

    /// Flushes to the device.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// The payload of the frame at `at`; `None` where no whole frame is.
    pub(super) fn read(&self, at: u64) -> io::Result<Option<Vec<u8>>> {
        let mut header = [0; FRAME_HEADER as usize];
        if at + FRAME_HEADER > self.len {
            return Ok(None);
        }
        self.file.read_exact_at(&mut header, at)?;
        let word = |at: usize| {
            let bytes = header[at..at + 4].try_into().expect("four bytes");
            u32::from_le_bytes(bytes)
        };
        let (len, crc) = (word(0) as usize, word(4));
        if len > MAX_PAYLOAD || at + FRAME_HEADER + len as u64 > self.len {
            return Ok(None);
        }
        let mut payload = vec![0; len];
        self.file.read_exact_at(&mut payload, at + FRAME_HEADER)?;
        Ok((crc32fast::hash(&payload) == crc).then_some(payload))
    }

    /// Calls `visit` with every whole frame's place and payload, in order. Gives the bytes that are no frames.
    pub(super) fn scan(
        &self,
        mut visit: impl FnMut(u64, Vec<u8>) -> io::Result<()>,
    ) -> io::Result<u64> {
        let mut magic = [0; MAGIC.len()];
        if self.len < magic.len() as u64 {
            return Ok(self.len);
        }
        self.file.read_exact_at(&mut magic, 0)?;
        if magic != MAGIC {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it is no session log of this version",
            ));
        }
        let mut at = MAGIC.len() as u64;
        while let Some(payload) = self.read(at)? {
            let next = at + FRAME_HEADER + payload.len() as u64;
            visit(at, payload)?;
            at = next;
        }
        Ok(self.len - at)
    }

    /// Replaces the file by one that `fill` writes.
    ///
    /// # Errors
    /// When the new one cannot be written; the old one stays.
    pub(super) fn rewrite(
        &mut self,
        fill: impl FnOnce(&Self, &mut Self) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut fresh = Self::unfinished(self.path.clone())?;
        let done = fill(self, &mut fresh)
            .and_then(|()| fresh.sync())
            .and_then(|()| fresh.publish());
        if let Err(error) = done {
            let _ = std::fs::remove_file(self.path.with_extension(UNFINISHED));
            return Err(error);
        }
        *self = fresh;
        Ok(())
    }
}
