//! [`Watched`]: what a process reads from files that may change while it runs: certificates, secrets, keys.
//!
//! There is no task and no notification: whoever wants the value asks for it, and at most once a second that looks at the
//! files again. Mounted secrets that are swapped by a link are noticed like files written in place. What cannot be read
//! or makes no sense is told once, and the value of before stays in force.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::ServiceError;

/// Longest file of this kind, in bytes.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// Least time between two looks at the files.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Makes the value of the files' contents; says what is wrong with them otherwise.
type Parse<T> = dyn Fn(&[Vec<u8>]) -> Result<T, String> + Send + Sync;

/// A value made of files.
pub struct Watched<T> {
    files: Vec<PathBuf>,
    parse: Box<Parse<T>>,
    state: Mutex<State<T>>,
}

struct State<T> {
    value: Arc<T>,
    looked: Instant,
    stamps: Vec<Option<Stamp>>,
}

/// Tells one state of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    len: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let metadata = fs::metadata(path).ok()?;
        Some(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            len: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

impl<T> Watched<T> {
    /// Reads the files for the first time.
    ///
    /// # Errors
    /// [`ServiceError::File`] when one cannot be read or makes no sense.
    pub fn load(
        files: Vec<PathBuf>,
        parse: impl Fn(&[Vec<u8>]) -> Result<T, String> + Send + Sync + 'static,
    ) -> Result<Self, ServiceError> {
        let stamps = stamps(&files);
        let value = read(&files, &parse)?;
        Ok(Self {
            files,
            parse: Box::new(parse),
            state: Mutex::new(State {
                value: Arc::new(value),
                looked: Instant::now(),
                stamps,
            }),
        })
    }

    /// A value that does not change.
    pub fn fixed(value: T) -> Self {
        Self {
            files: Vec::new(),
            parse: Box::new(|_| Err("there is no file".to_owned())),
            state: Mutex::new(State {
                value: Arc::new(value),
                looked: Instant::now(),
                stamps: Vec::new(),
            }),
        }
    }

    /// The value, as the files were within the last second.
    pub fn current(&self) -> Arc<T> {
        // No code panics while it holds the lock halfway through a change.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if self.files.is_empty() || state.looked.elapsed() < LOOK_INTERVAL {
            return Arc::clone(&state.value);
        }
        state.looked = Instant::now();
        // Taken before reading: a change meanwhile is seen at the next look.
        let stamps = stamps(&self.files);
        if stamps != state.stamps {
            state.stamps = stamps;
            match read(&self.files, &*self.parse) {
                Ok(value) => {
                    tracing::info!(files = ?self.files, "changed: read again");
                    state.value = Arc::new(value);
                }
                Err(error) => {
                    tracing::error!(%error, "changed, but what was read before stays in force");
                }
            }
        }
        Arc::clone(&state.value)
    }
}

impl<T> std::fmt::Debug for Watched<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watched")
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

fn stamps(files: &[PathBuf]) -> Vec<Option<Stamp>> {
    files.iter().map(|path| Stamp::of(path)).collect()
}

fn read<T>(files: &[PathBuf], parse: &Parse<T>) -> Result<T, ServiceError> {
    let contents: Result<Vec<_>, _> = files.iter().map(|path| read_file(path)).collect();
    parse(&contents?).map_err(|reason| ServiceError::File {
        path: files.first().cloned().unwrap_or_default(),
        reason,
    })
}

fn read_file(path: &Path) -> Result<Vec<u8>, ServiceError> {
    let failed = |reason: String| ServiceError::File {
        path: path.to_owned(),
        reason,
    };
    let file = File::open(path).map_err(|error| failed(error.to_string()))?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| failed(error.to_string()))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(failed(format!("is longer than {MAX_FILE_BYTES} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(contents: &[Vec<u8>]) -> Result<u32, String> {
        let text = String::from_utf8_lossy(&contents[0]);
        text.trim().parse().map_err(|_| "is no number".to_owned())
    }

    #[test]
    fn changes_are_taken_and_nonsense_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("number");
        fs::write(&path, "1").unwrap();
        let watched = Watched::load(vec![path.clone()], number).unwrap();
        let look = || {
            watched.state.lock().unwrap().looked -= LOOK_INTERVAL;
            *watched.current()
        };
        assert_eq!(look(), 1);
        fs::write(&path, "22").unwrap();
        assert_eq!(*watched.current(), 1, "not more than once a second");
        assert_eq!(look(), 22);
        fs::write(&path, "nonsense").unwrap();
        assert_eq!(look(), 22);
        fs::remove_file(&path).unwrap();
        assert_eq!(look(), 22);
        // As Kubernetes swaps secrets: a link to another file of the same length.
        let other = dir.path().join("other");
        fs::write(&other, "33").unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        assert_eq!(look(), 33);
    }

    #[test]
    fn the_first_reading_must_succeed() {
        let dir = tempfile::tempdir().unwrap();
        let missing = Watched::load(vec![dir.path().join("none")], number);
        assert_eq!(missing.unwrap_err().label(), "file");
    }
}
