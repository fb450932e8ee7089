//! The session log: every committed token is on file before a client hears of it.
//!
//! One thread, the [`keeper`], owns the [`journal`]: a file to which records of all sessions are appended. It takes what has
//! gathered since its last write and writes it at once, so that many sessions share one write and one flush. [`index`]
//! knows where each session's records are, and which may go. A folder may serve many gateways: each appends to a file of
//! its own, on which it holds a lock for as long as it lives, and takes over the files whose lock it can get.
//!
//! What a record is: `proto/specattn/v1/log.proto`.

mod config;
mod index;
mod journal;
mod keeper;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use specattn_proto::v1::{
    LogRecord, LoggedEnd, LoggedSession, LoggedTokens, SessionStats, TokenLogprobs, log_record,
};
use specattn_proto::{Fault, SessionId};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

pub use config::{Fsync, LogArgs, LogConfig};

use crate::error::GatewayError;
use keeper::{Command, Keeper};

/// Commands that may wait for the keeper.
const QUEUE: usize = 1_024;

/// Time between looks whether there is room for a log by now.
const ROOM_CHECK: Duration = Duration::from_millis(500);

/// The log, as sessions use it.
#[derive(Clone)]
pub(crate) struct SessionLog {
    commands: mpsc::Sender<Command>,
    gauge: Arc<Gauge>,
}

/// How full the log is.
#[derive(Debug, Default)]
struct Gauge {
    bytes: AtomicU64,
    sessions: AtomicU64,
    times: Times,
}

/// How long the log's device takes.
#[derive(Debug)]
pub(crate) struct Times {
    /// Seconds of each append.
    pub(crate) write: Histogram,
    /// Seconds of each flush.
    pub(crate) flush: Histogram,
}

impl Default for Times {
    fn default() -> Self {
        // 1 µs to 1 s.
        let buckets = || exponential_buckets(1e-6, 4.0, 11);
        Self {
            write: Histogram::new(buckets()),
            flush: Histogram::new(buckets()),
        }
    }
}

/// A session as it was logged.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Stored {
    pub(crate) session: LoggedSession,
    /// Of the completion.
    pub(crate) tokens: Vec<u32>,
    /// One per token when asked for, else empty.
    pub(crate) logprobs: Vec<TokenLogprobs>,
    /// Microseconds from arrival to the first token.
    pub(crate) first_token_us: Option<u64>,
    /// What it is known to have cost.
    pub(crate) stats: SessionStats,
    /// `None`: it can be continued.
    pub(crate) end: Option<LoggedEnd>,
}

impl SessionLog {
    /// Opens the log in its folder and takes over what dead gateways have left there. The keeper's thread ends after
    /// [`SessionLog::close`].
    ///
    /// # Errors
    /// [`GatewayError::Log`] when the folder cannot be used.
    pub(crate) fn open(config: LogConfig) -> Result<(Self, JoinHandle<()>), GatewayError> {
        let (commands, inbox) = mpsc::channel(QUEUE);
        let gauge = Arc::new(Gauge::default());
        let failed = |dir: &std::path::Path, source| GatewayError::Log {
            path: dir.to_owned(),
            source,
        };
        let dir = config.dir.clone();
        let keeper =
            Keeper::open(config, Arc::clone(&gauge)).map_err(|error| failed(&dir, error))?;
        let thread = std::thread::Builder::new()
            .name("session-log".to_owned())
            .spawn(move || keeper.run(inbox))
            .map_err(|error| failed(&dir, error))?;
        Ok((Self { commands, gauge }, thread))
    }

    /// The same, once there is room for a file: a full disk must not keep a gateway from coming back when it has been cleared.
    /// `None` after a shutdown.
    ///
    /// # Errors
    /// As [`SessionLog::open`], and [`GatewayError::Task`].
    pub(crate) async fn open_when_there_is_room(
        config: LogConfig,
        shutdown: &CancellationToken,
    ) -> Result<Option<(Self, JoinHandle<()>)>, GatewayError> {
        let mut told = false;
        loop {
            let config = config.clone();
            let opening = tokio::task::spawn_blocking(move || Self::open(config));
            let opened = opening.await;
            match opened.map_err(|error| GatewayError::Task(error.to_string()))? {
                Err(GatewayError::Log { path, source })
                    if journal::is_for_want_of_room(&source) =>
                {
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!(path = %path.display(), error = %source, "no room for a session log: waiting for some");
                    }
                }
                opened => return opened.map(Some),
            }
            tokio::select! {
                () = tokio::time::sleep(ROOM_CHECK) => {}
                () = shutdown.cancelled() => return Ok(None),
            }
        }
    }

    /// Lets the keeper flush and end.
    pub(crate) async fn close(&self) {
        // One that is gone has ended.
        let _ = self.commands.send(Command::Close).await;
    }

    /// Bytes of the log, and sessions in it.
    pub(crate) fn usage(&self) -> (u64, u64) {
        (
            self.gauge.bytes.load(Ordering::Relaxed),
            self.gauge.sessions.load(Ordering::Relaxed),
        )
    }

    /// How long its device takes.
    pub(crate) fn times(&self) -> &Times {
        &self.gauge.times
    }

    /// Logs that a session began.
    ///
    /// # Errors
    /// [`Fault::ResourceExhausted`] when the log is full, [`Fault::Unavailable`] when it failed.
    pub(crate) async fn begin(
        &self,
        id: SessionId,
        session: LoggedSession,
    ) -> Result<SessionWriter, Fault> {
        let writer = self.writer(id);
        writer.write(log_record::Record::Session(session)).await?;
        Ok(writer)
    }

    /// Finds a session, here or in the file of a gateway that died. Nobody else may write it meanwhile.
    ///
    /// # Errors
    /// [`Fault::Unavailable`] when the log failed, [`Fault::Internal`] when the session's records are damaged.
    pub(crate) async fn load(
        &self,
        id: SessionId,
    ) -> Result<Option<(Stored, SessionWriter)>, Fault> {
        let writer = self.writer(id);
        let (reply, answer) = oneshot::channel();
        let holder = Arc::downgrade(&writer.alive);
        let stored = self.ask(Command::Load { id, holder, reply }, answer);
        Ok(stored.await?.map(|stored| (*stored, writer)))
    }

    fn writer(&self, id: SessionId) -> SessionWriter {
        SessionWriter {
            log: self.clone(),
            id,
            alive: Arc::new(()),
        }
    }

    async fn ask<T>(
        &self,
        command: Command,
        answer: oneshot::Receiver<Result<T, Fault>>,
    ) -> Result<T, Fault> {
        let gone = || Fault::Unavailable("the session log is closed".to_owned());
        self.commands.send(command).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// The right to log one session; for as long as it is held the session is not dropped from the log.
pub(crate) struct SessionWriter {
    log: SessionLog,
    id: SessionId,
    alive: Arc<()>,
}

impl SessionWriter {
    /// Logs committed tokens; they may be told of once this returns.
    ///
    /// # Errors
    /// As [`SessionLog::begin`]; the tokens are not logged then.
    pub(crate) async fn append(&self, tokens: LoggedTokens) -> Result<(), Fault> {
        self.write(log_record::Record::Tokens(tokens)).await
    }

    /// Logs the session's end.
    ///
    /// # Errors
    /// As [`SessionLog::begin`].
    pub(crate) async fn end(&self, end: LoggedEnd) -> Result<(), Fault> {
        self.write(log_record::Record::End(end)).await
    }

    async fn write(&self, record: log_record::Record) -> Result<(), Fault> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Write {
            id: self.id,
            record: Box::new(LogRecord {
                session_id: self.id.to_string(),
                record: Some(record),
            }),
            holder: Arc::downgrade(&self.alive),
            reply,
        };
        self.log.ask(command, answer).await
    }
}

#[cfg(test)]
mod tests;
