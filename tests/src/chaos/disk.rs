//! [`Disk`]: a small file system for session logs that can be filled up.

use std::ffi::CStr;
use std::fs;
use std::io::Write;
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;

/// Its size.
const OPTIONS: &CStr = c"size=64m";

/// What fills it.
const BALLAST: &str = "ballast";

/// A folder on a tmpfs of its own; where none can be mounted an ordinary folder, which never fills up.
#[derive(Debug)]
pub struct Disk {
    folder: TempDir,
    mounted: bool,
}

impl Disk {
    /// An empty disk.
    #[allow(clippy::new_without_default, reason = "it mounts a file system")]
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let mounted = mount(
            "tmpfs",
            folder.path(),
            "tmpfs",
            MountFlags::empty(),
            OPTIONS,
        );
        if let Err(error) = &mounted {
            eprintln!(
                "NO SMALL DISK: no tmpfs can be mounted ({error}); in place of a full disk the files of gateways may not grow"
            );
        }
        Self {
            folder,
            mounted: mounted.is_ok(),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Leaves no room; false where that cannot be.
    pub fn fill(&self) -> bool {
        if self.mounted {
            let ballast = fs::File::create(self.path().join(BALLAST));
            let mut ballast = ballast.expect("a file can be made");
            let chunk = vec![0; 64 << 10];
            // The last chunk fills what is left in part.
            while ballast.write_all(&chunk).is_ok() {}
        }
        self.mounted
    }

    /// Makes room again; false where there always was.
    pub fn free(&self) -> bool {
        // Not there where the disk was never filled.
        let _ = fs::remove_file(self.path().join(BALLAST));
        self.mounted
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.mounted {
            // Lazily: a process that still runs may hold a file of it open.
            let _ = unmount(self.folder.path(), UnmountFlags::DETACH);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_takes_nothing_until_it_is_freed() {
        let disk = Disk::new();
        let write = || fs::write(disk.path().join("log"), vec![1; 1 << 20]);
        write().unwrap();
        let full = disk.fill();
        let more = fs::write(disk.path().join("more"), vec![1; 1 << 20]);
        assert_eq!(more.is_err(), full);
        assert_eq!(disk.free(), full);
        write().unwrap();
    }
}
