//! [`Account`]: what became of every session.

use std::collections::BTreeMap;
use std::fmt;

/// What became of sessions.
#[derive(Debug, Default)]
pub struct Account {
    /// Ended as asked, with the undisturbed answer where that is known.
    pub finished: u64,
    /// Of these, those that were resumed on the way.
    pub resumed: u64,
    /// Sessions that were resumed while their first stream still ran.
    pub taken_over: u64,
    /// Left by their client.
    pub vanished: u64,
    /// Refused before they began, by the gateway or for want of one.
    pub refused: BTreeMap<String, u64>,
    /// Began and did not end, or were refused for a wrong reason.
    pub lost: Vec<String>,
    /// Came to other tokens or text than undisturbed, or to some of them twice.
    pub wrong: Vec<String>,
}

impl Account {
    /// Sessions in all.
    pub fn sessions(&self) -> u64 {
        let refused: u64 = self.refused.values().sum();
        let failed = self.lost.len() + self.wrong.len();
        self.finished + self.vanished + refused + failed as u64
    }

    /// Adds another client's.
    pub fn add(&mut self, other: Self) {
        self.finished += other.finished;
        self.resumed += other.resumed;
        self.taken_over += other.taken_over;
        self.vanished += other.vanished;
        for (code, count) in other.refused {
            *self.refused.entry(code).or_default() += count;
        }
        self.lost.extend(other.lost);
        self.wrong.extend(other.wrong);
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} sessions: {} finished ({} of them resumed), {} left by their clients, refused {:?}, {} lost, {} wrong; {} were resumed while they were read",
            self.sessions(),
            self.finished,
            self.resumed,
            self.vanished,
            self.refused,
            self.lost.len(),
            self.wrong.len(),
            self.taken_over,
        )
    }
}
