//! [`Index`]: where each session's records are, and which sessions may be dropped.

use std::collections::HashMap;
use std::sync::Weak;
use std::time::Duration;

use specattn_proto::SessionId;

/// The sessions of a journal.
#[derive(Default)]
pub(super) struct Index {
    sessions: HashMap<SessionId, Held>,
    /// Bytes of their frames.
    bytes: u64,
}

/// A session's records.
#[derive(Default)]
pub(super) struct Held {
    /// Places of its frames, in order.
    frames: Vec<u64>,
    bytes: u64,
    /// Unix time in milliseconds of its end, if it ended.
    ended: Option<u64>,
    /// Of its last record.
    touched: u64,
    /// Alive while the session runs.
    holder: Weak<()>,
}

/// A record's place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) at: u64,
    pub(super) bytes: u64,
    /// Unix time in milliseconds of the end that the record tells of, if it does.
    pub(super) ended: Option<u64>,
}

impl Held {
    fn is_running(&self) -> bool {
        self.holder.strong_count() > 0
    }

    /// Since when it is of no use to anyone but a client that comes back.
    fn idle_since(&self) -> u64 {
        self.ended.unwrap_or(self.touched)
    }
}

impl Index {
    /// Bytes of the sessions' frames.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many sessions there are.
    pub(super) fn len(&self) -> usize {
        self.sessions.len()
    }

    /// Notes a record.
    pub(super) fn add(&mut self, id: SessionId, place: Place, now: u64) {
        let held = self.sessions.entry(id).or_default();
        held.frames.push(place.at);
        held.bytes += place.bytes;
        held.ended = place.ended.or(held.ended);
        held.touched = now;
        self.bytes += place.bytes;
    }

    /// Notes who runs a session; false when it is not here.
    pub(super) fn hold(&mut self, id: SessionId, holder: Weak<()>) -> bool {
        let held = self.sessions.get_mut(&id);
        held.map(|held| held.holder = holder).is_some()
    }

    /// Places of a session's records, in order.
    pub(super) fn frames(&self, id: SessionId) -> Option<&[u64]> {
        self.sessions.get(&id).map(|held| held.frames.as_slice())
    }

    /// Drops sessions that have not run for `keep`, then the longest idle ones until at most `bytes` are left.
    pub(super) fn drop_idle(&mut self, now: u64, keep: Duration, bytes: u64) {
        let keep = u64::try_from(keep.as_millis()).unwrap_or(u64::MAX);
        self.sessions
            .retain(|_, held| held.is_running() || now.saturating_sub(held.idle_since()) <= keep);
        self.bytes = self.sessions.values().map(|held| held.bytes).sum();
        if self.bytes <= bytes {
            return;
        }
        // Sessions that can be continued go last.
        let idle = self.sessions.iter().filter(|(_, held)| !held.is_running());
        let mut idle: Vec<_> = idle
            .map(|(id, held)| (held.ended.is_none(), held.idle_since(), *id))
            .collect();
        idle.sort_unstable();
        for (_, _, id) in idle {
            if self.bytes <= bytes {
                break;
            }
            if let Some(held) = self.sessions.remove(&id) {
                self.bytes -= held.bytes;
            }
        }
    }

    /// Every session's frames may move to where `copy` says.
    pub(super) fn relocate<E>(
        &mut self,
        mut copy: impl FnMut(u64) -> Result<u64, E>,
    ) -> Result<Vec<(SessionId, Vec<u64>)>, E> {
        let mut moved = Vec::with_capacity(self.sessions.len());
        for (id, held) in &self.sessions {
            let frames = held.frames.iter().map(|&at| copy(at));
            moved.push((*id, frames.collect::<Result<_, E>>()?));
        }
        Ok(moved)
    }

    /// They have moved.
    pub(super) fn moved(&mut self, moved: Vec<(SessionId, Vec<u64>)>) {
        for (id, frames) in moved {
            if let Some(held) = self.sessions.get_mut(&id) {
                held.frames = frames;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn place(bytes: u64, ended: Option<u64>) -> Place {
        Place {
            at: 0,
            bytes,
            ended,
        }
    }

    #[test]
    fn what_runs_is_kept_and_the_longest_idle_goes_first() {
        let mut index = Index::default();
        let id = SessionId::from_bits;
        let alive = Arc::new(());
        index.add(id(1), place(10, Some(5)), 0);
        index.add(id(2), place(10, Some(50)), 0);
        index.add(id(3), place(10, None), 60);
        index.add(id(4), place(10, None), 0);
        assert!(index.hold(id(4), Arc::downgrade(&alive)));
        let keep = Duration::from_millis(60);
        index.drop_idle(66, keep, 1_000);
        assert!(index.frames(id(1)).is_none() && index.len() == 3);
        // Of two that could go, the one that ended.
        index.drop_idle(66, keep, 25);
        assert!(index.frames(id(2)).is_none() && index.bytes() == 20);
        index.drop_idle(1_000, keep, 0);
        assert_eq!(index.len(), 1);
        drop(alive);
        index.drop_idle(1_000, keep, 0);
        assert_eq!((index.len(), index.bytes()), (0, 0));
    }
}
