//! How the session log is kept: [`LogArgs`] and the checked [`LogConfig`].

use std::path::PathBuf;
use std::time::Duration;

use crate::error::GatewayError;

/// When what was written is flushed to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Fsync {
    /// Leave it to the operating system
    Never,
    /// Every --log-fsync-interval-ms
    Interval,
    /// Before a client hears of the tokens
    Commit,
}

/// The durable log of sessions and their committed tokens.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Session log")]
pub struct LogArgs {
    /// Folder of the session log; gateways that share it take over each other's sessions. Without it sessions end with the
    /// gateway
    #[arg(long, value_name = "DIR")]
    pub log_dir: Option<PathBuf>,

    /// When log writes are flushed to the device. The death of the process loses nothing under any policy. A power failure
    /// loses up to half a minute of tokens under never, one interval under interval, nothing under commit, which costs a
    /// device flush before each message to a client
    #[arg(long, value_enum, value_name = "POLICY", default_value_t = Fsync::Interval)]
    pub log_fsync: Fsync,

    /// Milliseconds between flushes under --log-fsync interval
    #[arg(long, value_name = "MS", default_value_t = 100)]
    pub log_fsync_interval_ms: u64,

    /// Largest size of this gateway's log file in MiB. Ended sessions are dropped, oldest first, to stay under it; when
    /// those that run fill it, requests are refused
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    pub log_size_mib: u64,

    /// Seconds for which ended sessions, and sessions left by their clients, stay in the log and can be resumed
    #[arg(long, value_name = "S", default_value_t = 3_600)]
    pub log_keep_s: u64,
}

/// A session log's checked configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// Its folder, made when it is not there.
    pub dir: PathBuf,
    /// When what was written is flushed.
    pub fsync: Fsync,
    /// Time between flushes under [`Fsync::Interval`].
    pub fsync_interval: Duration,
    /// Largest size of the file.
    pub size_bytes: u64,
    /// How long sessions that do not run are kept.
    pub keep: Duration,
}

impl LogConfig {
    /// The defaults of the command line, for a log in `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            fsync: Fsync::Interval,
            fsync_interval: Duration::from_millis(100),
            size_bytes: 256 << 20,
            keep: Duration::from_secs(3_600),
        }
    }
}

impl LogArgs {
    /// The checked configuration; `None` without a folder.
    ///
    /// # Errors
    /// [`GatewayError::Argument`].
    pub fn config(&self) -> Result<Option<LogConfig>, GatewayError> {
        let bad = |argument, reason: &str| GatewayError::Argument {
            argument,
            reason: reason.to_owned(),
        };
        if !(1..=60_000).contains(&self.log_fsync_interval_ms) {
            let reason = "must be between 1 and 60,000";
            return Err(bad("--log-fsync-interval-ms", reason));
        }
        if !(1..=1 << 20).contains(&self.log_size_mib) {
            return Err(bad("--log-size-mib", "must be between 1 and 1,048,576"));
        }
        let Some(dir) = &self.log_dir else {
            return Ok(None);
        };
        Ok(Some(LogConfig {
            dir: dir.clone(),
            fsync: self.log_fsync,
            fsync_interval: Duration::from_millis(self.log_fsync_interval_ms),
            size_bytes: self.log_size_mib << 20,
            keep: Duration::from_secs(self.log_keep_s),
        }))
    }
}
