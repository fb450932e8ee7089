//! [`Keeper`]: the thread that owns the journal and its index.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use prost::Message;
use specattn_proto::v1::{LogRecord, log_record};
use specattn_proto::{Fault, SessionId};
use tokio::sync::{mpsc, oneshot};

use super::config::{Fsync, LogConfig};
use super::index::{Index, Place};
use super::journal::{self, Journal};
use super::{Gauge, Stored};
use crate::recipe::unix_ms;

/// Most bytes written at once.
const MOST_AT_ONCE: usize = 1 << 20;

/// A journal below this size is not rewritten to be rid of what was dropped.
const REWRITE_FROM: u64 = 1 << 20;

/// Time between looks at what may be dropped and at files that lost their gateway.
const HOUSEKEEPING: Duration = Duration::from_secs(10);

/// When to try again after the log was full.
const RETRY_AFTER: Duration = Duration::from_secs(1);

type Reply<T> = oneshot::Sender<Result<T, Fault>>;

/// What sessions ask.
pub(super) enum Command {
    /// Log a record.
    Write {
        id: SessionId,
        record: Box<LogRecord>,
        holder: Weak<()>,
        reply: Reply<()>,
    },
    /// Find a session.
    Load {
        id: SessionId,
        holder: Weak<()>,
        reply: Reply<Option<Box<Stored>>>,
    },
    /// Flush and end.
    Close,
}

/// A record that waits to be written.
struct Waiting {
    id: SessionId,
    /// Within the bytes to be written.
    place: Place,
    begins: bool,
    holder: Weak<()>,
    reply: Reply<()>,
}

/// See the module's text.
pub(super) struct Keeper {
    config: LogConfig,
    gauge: Arc<Gauge>,
    journal: Journal,
    index: Index,
    /// When what was written last must be flushed, where it must.
    flush_at: Option<Instant>,
    tidy_at: Instant,
    /// Why nothing can be logged any more. After a failed flush nobody knows what is on the device.
    failed: Option<String>,
}

impl Keeper {
    /// Opens the log in the configured folder and takes over what dead gateways have left.
    pub(super) fn open(config: LogConfig, gauge: Arc<Gauge>) -> io::Result<Self> {
        std::fs::create_dir_all(&config.dir)?;
        let mut keeper = Self {
            journal: Journal::create(&config.dir)?,
            config,
            gauge,
            index: Index::default(),
            flush_at: None,
            tidy_at: Instant::now() + HOUSEKEEPING,
            failed: None,
        };
        keeper.take_over();
        keeper.report();
        Ok(keeper)
    }

    /// Serves until the log is closed.
    pub(super) fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build();
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => return tracing::error!(%error, "the session log cannot run"),
        };
        loop {
            let until = self.flush_at.unwrap_or(self.tidy_at).min(self.tidy_at);
            let next = runtime
                .block_on(async { tokio::time::timeout_at(until.into(), inbox.recv()).await });
            let open = match next {
                Ok(Some(command)) => self.serve(command, &mut inbox),
                Ok(None) => false,
                Err(_) => true,
            };
            let now = Instant::now();
            if self.flush_at.is_some_and(|at| at <= now) || !open {
                self.flush();
            }
            if !open {
                return;
            }
            if self.tidy_at <= now {
                self.tidy_at = now + HOUSEKEEPING;
                self.take_over();
                self.tidy(self.config.size_bytes);
            }
            self.report();
        }
    }

    /// Serves a command, and with a record to write all that wait behind it. False when the log was closed.
    fn serve(&mut self, first: Command, inbox: &mut mpsc::Receiver<Command>) -> bool {
        let (mut buffer, mut waiting) = (Vec::new(), Vec::new());
        let mut next = Some(first);
        let mut open = true;
        while let Some(command) = next.take() {
            match command {
                Command::Write {
                    id,
                    record,
                    holder,
                    reply,
                } => {
                    let at = buffer.len();
                    if let Err(error) = journal::frame(&record.encode_to_vec(), &mut buffer) {
                        // Nobody waits any more where this is not heard.
                        let _ = reply.send(Err(Fault::Internal(error.to_string())));
                    } else {
                        waiting.push(Waiting {
                            id,
                            place: place(&record, at as u64, buffer.len() - at),
                            begins: matches!(record.record, Some(log_record::Record::Session(_))),
                            holder,
                            reply,
                        });
                    }
                }
                Command::Load { id, holder, reply } => {
                    self.write(&mut buffer, &mut waiting);
                    let _ = reply.send(self.load(id, holder));
                }
                Command::Close => open = false,
            }
            if open && buffer.len() < MOST_AT_ONCE {
                next = inbox.try_recv().ok();
            }
        }
        self.write(&mut buffer, &mut waiting);
        open
    }

    /// Writes what has gathered, and answers everybody.
    fn write(&mut self, buffer: &mut Vec<u8>, waiting: &mut Vec<Waiting>) {
        if waiting.is_empty() {
            return;
        }
        let outcome = self.append(buffer).and_then(|at| {
            // Synced before anything is told of it.
            match self.config.fsync {
                Fsync::Commit => self.sync().map(|()| at),
                Fsync::Interval => {
                    let due = Instant::now() + self.config.fsync_interval;
                    self.flush_at.get_or_insert(due);
                    Ok(at)
                }
                Fsync::Never => Ok(at),
            }
        });
        let now = unix_ms();
        for record in waiting.drain(..) {
            let answer = match &outcome {
                // A session that the log dropped cannot go on in it.
                Ok(_) if !record.begins && self.index.frames(record.id).is_none() => Err(
                    Fault::Unavailable("the session is not in the log any more".to_owned()),
                ),
                Ok(at) => {
                    let place = Place {
                        at: at + record.place.at,
                        ..record.place
                    };
                    self.index.add(record.id, place, now);
                    self.index.hold(record.id, record.holder);
                    Ok(())
                }
                Err(fault) => Err(fault.clone()),
            };
            let _ = record.reply.send(answer);
        }
        buffer.clear();
    }

    /// Appends frames; makes room for them first where there is too little.
    fn append(&mut self, frames: &[u8]) -> Result<u64, Fault> {
        if let Some(reason) = &self.failed {
            return Err(Fault::Unavailable(reason.clone()));
        }
        let size = self.config.size_bytes;
        let needed = frames.len() as u64;
        if self.journal.len() + needed > size {
            // Down to half, so that a log that is always full is not rewritten at every turn.
            self.tidy(size / 2);
        }
        if self.journal.len() + needed > size {
            return Err(full(format!(
                "the session log holds {} of {size} bytes, all of running sessions",
                self.journal.len()
            )));
        }
        let start = Instant::now();
        let appended = self.journal.append(frames);
        let took = start.elapsed();
        self.gauge.times.write.observe(took.as_secs_f64());
        appended.map_err(|error| {
            tracing::error!(%error, "the session log cannot be written");
            let text = format!("the session log cannot be written: {error}");
            if journal::is_for_want_of_room(&error) {
                full(text)
            } else {
                Fault::Unavailable(text)
            }
        })
    }

    /// Flushes to the device.
    fn sync(&mut self) -> Result<(), Fault> {
        self.flush_at = None;
        let start = Instant::now();
        let synced = self.journal.sync();
        let took = start.elapsed();
        self.gauge.times.flush.observe(took.as_secs_f64());
        synced.map_err(|error| {
            let reason = format!("the session log cannot be flushed: {error}");
            tracing::error!("{reason}; restart the gateway");
            self.failed = Some(reason.clone());
            Fault::Unavailable(reason)
        })
    }

    fn flush(&mut self) {
        if self.failed.is_none() && self.config.fsync != Fsync::Never {
            // What it says was logged; later writes are refused.
            let _ = self.sync();
        }
    }

    /// Drops what may go, down to `bytes` where that is possible, and rewrites the journal when enough of it is waste.
    fn tidy(&mut self, bytes: u64) {
        let now = unix_ms();
        let crowded = self.journal.len() > bytes;
        let most = if crowded { bytes } else { u64::MAX };
        self.index.drop_idle(now, self.config.keep, most);
        let waste = self.journal.len().saturating_sub(self.index.bytes());
        let worth = if crowded {
            self.journal.len() / 8
        } else {
            self.journal.len() / 2
        };
        if self.failed.is_some()
            || waste <= worth
            || (self.journal.len() < REWRITE_FROM && !crowded)
        {
            return;
        }
        let before = self.journal.len();
        let index = &mut self.index;
        let mut moved = Vec::new();
        let rewritten = self.journal.rewrite(|old, new| {
            let mut frames = Vec::new();
            moved = index.relocate(|at| {
                let payload = old.read(at)?.ok_or_else(damaged)?;
                frames.clear();
                journal::frame(&payload, &mut frames)?;
                new.append(&frames)
            })?;
            Ok(())
        });
        match rewritten {
            Ok(()) => {
                self.index.moved(moved);
                tracing::info!(before, after = self.journal.len(), "session log compacted");
            }
            Err(error) => tracing::error!(%error, "the session log cannot be compacted"),
        }
    }

    /// Takes over the files of dead gateways.
    fn take_over(&mut self) {
        let found = match Journal::abandoned(&self.config.dir) {
            Ok(found) => found,
            Err(error) => return tracing::error!(%error, "cannot look for abandoned session logs"),
        };
        for theirs in found {
            let path = theirs.path().display().to_string();
            match self.import(&theirs) {
                Ok(sessions) => {
                    if let Err(error) = std::fs::remove_file(theirs.path()) {
                        tracing::error!(path, %error, "cannot remove a session log taken over");
                    }
                    tracing::info!(
                        path,
                        sessions,
                        "took over the session log of a dead gateway"
                    );
                }
                Err(error) => {
                    tracing::error!(path, %error, "cannot take over a session log: it is left where it is");
                }
            }
        }
    }

    /// Copies all records of another journal; all or nothing. Gives the number of its sessions.
    fn import(&mut self, theirs: &Journal) -> io::Result<usize> {
        let now = unix_ms();
        let before = self.journal.len();
        let mut places = Vec::new();
        let ours = &mut self.journal;
        let mut frames = Vec::new();
        let copied = theirs.scan(|_, payload| {
            let Ok(record) = LogRecord::decode(payload.as_slice()) else {
                return Err(damaged());
            };
            let id: SessionId = record.session_id.parse().map_err(|_| damaged())?;
            frames.clear();
            journal::frame(&payload, &mut frames)?;
            let at = ours.append(&frames)?;
            places.push((id, place(&record, at, frames.len())));
            Ok(())
        });
        // Theirs goes next: ours must be on the device.
        let copied = copied.and_then(|rest| ours.sync().map(|()| rest));
        match copied {
            Ok(rest) if rest > 0 => tracing::warn!(rest, "a session log ends within a record"),
            Ok(_) => {}
            Err(error) => {
                ours.truncate(before);
                return Err(error);
            }
        }
        let sessions = self.index.len();
        for (id, place) in places {
            self.index.add(id, place, now);
        }
        Ok(self.index.len() - sessions)
    }

    fn load(&mut self, id: SessionId, holder: Weak<()>) -> Result<Option<Box<Stored>>, Fault> {
        if self.index.frames(id).is_none() {
            self.take_over();
        }
        let Some(frames) = self.index.frames(id) else {
            return Ok(None);
        };
        let mut stored = Stored::default();
        for &at in frames {
            let record = self
                .journal
                .read(at)
                .and_then(|payload| payload.ok_or_else(damaged))
                .and_then(|payload| LogRecord::decode(payload.as_slice()).map_err(io::Error::other))
                .map_err(|error| Fault::Internal(format!("the session log is damaged: {error}")))?;
            stored.take(record)?;
        }
        self.index.hold(id, holder);
        Ok(Some(Box::new(stored)))
    }

    fn report(&self) {
        let gauge = &self.gauge;
        gauge.bytes.store(self.journal.len(), Ordering::Relaxed);
        let sessions = self.index.len() as u64;
        gauge.sessions.store(sessions, Ordering::Relaxed);
    }
}

impl Stored {
    /// Takes the next record.
    fn take(&mut self, record: LogRecord) -> Result<(), Fault> {
        match record.record {
            Some(log_record::Record::Session(session)) => self.session = session,
            Some(log_record::Record::Tokens(tokens)) => {
                // A take-over that was cut short leaves records twice.
                let known = (self.tokens.len() as u64).checked_sub(tokens.start);
                let known = known.ok_or_else(|| {
                    Fault::Internal("the session log lacks tokens of the session".to_owned())
                })? as usize;
                let stats = tokens.stats.unwrap_or_default();
                if stats.target_forwards >= self.stats.target_forwards {
                    self.stats = stats;
                }
                self.first_token_us.get_or_insert(tokens.elapsed_us);
                self.tokens.extend(tokens.token_ids.iter().skip(known));
                self.logprobs
                    .extend(tokens.logprobs.into_iter().skip(known));
            }
            Some(log_record::Record::End(end)) => {
                self.stats = end.stats.unwrap_or(self.stats);
                self.end = Some(end);
            }
            // A record of a later version.
            None => {}
        }
        Ok(())
    }
}

fn place(record: &LogRecord, at: u64, bytes: usize) -> Place {
    Place {
        at,
        bytes: bytes as u64,
        ended: match &record.record {
            Some(log_record::Record::End(end)) => Some(end.ended_unix_ms),
            _ => None,
        },
    }
}

fn full(message: String) -> Fault {
    Fault::ResourceExhausted {
        message,
        retry_after: Some(RETRY_AFTER),
    }
}

fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a record is damaged")
}
