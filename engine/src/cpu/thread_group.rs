//! [`ThreadGroup`]: ranks as threads of one process, adding up in host memory.
//!
//! For machines without several GPUs and for tests: the split itself is the same code on every device. Sums are taken rank by
//! rank, so they have one order.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::CpuBackend;
use super::memory::Buffer;
use crate::communicator::Communicator;

/// What the ranks of one model have laid down for the sum at hand.
struct Meeting {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// By rank; taken away when every rank has read all of them.
    parts: Vec<Option<Vec<f32>>>,
    readers: usize,
    /// Somebody has left.
    broken: bool,
}

/// One rank's end.
pub(crate) struct ThreadGroup {
    meeting: Arc<Meeting>,
    rank: usize,
}

impl ThreadGroup {
    /// The ends of a group of `of` ranks.
    pub(crate) fn new(of: usize) -> Vec<Self> {
        let meeting = Arc::new(Meeting {
            state: Mutex::new(State {
                parts: vec![None; of],
                readers: 0,
                broken: false,
            }),
            changed: Condvar::new(),
        });
        let end = |rank| Self {
            meeting: Arc::clone(&meeting),
            rank,
        };
        (0..of).map(end).collect()
    }

    /// Waits until `ready`, or until somebody has left.
    fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        ready: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        self.meeting
            .changed
            .wait_while(state, |state| !state.broken && !ready(state))
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let state = self.meeting.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Communicator<CpuBackend> for ThreadGroup {
    fn sum(&self, x: &mut Buffer, _bulk: bool) {
        // A rank may come back before the last one has read the sum before.
        let mut state = self.wait(self.state(), |state| state.parts[self.rank].is_none());
        state.parts[self.rank] = Some(x.to_vec());
        self.meeting.changed.notify_all();
        let mut state = self.wait(state, |state| state.parts.iter().all(Option::is_some));
        if state.broken {
            return;
        }
        for (rank, part) in state.parts.iter().flatten().enumerate() {
            for (x, &part) in x.iter_mut().zip(part) {
                *x = if rank == 0 { part } else { *x + part };
            }
        }
        state.readers += 1;
        if state.readers == state.parts.len() {
            state.readers = 0;
            state.parts.fill(None);
            self.meeting.changed.notify_all();
        }
    }

    fn leave(&self) {
        self.state().broken = true;
        self.meeting.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffer(values: &[f32]) -> Buffer {
        let mut buffer = Buffer::new();
        buffer.resize(values.len());
        buffer.copy_from_slice(values);
        buffer
    }

    #[test]
    fn every_rank_gets_every_sum() {
        let sums = |end: ThreadGroup| {
            let mut of_round = |round: u32| {
                let own = (round * 10 + end.rank as u32) as f32;
                let mut x = buffer(&vec![own; 1 + round as usize % 7]);
                end.sum(&mut x, false);
                x.to_vec()
            };
            (0..200).map(&mut of_round).collect::<Vec<_>>()
        };
        let all: Vec<Vec<Vec<f32>>> = std::thread::scope(|scope| {
            let ends = ThreadGroup::new(3).into_iter();
            let ranks: Vec<_> = ends.map(|end| scope.spawn(move || sums(end))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        for (round, sum) in all[0].iter().enumerate() {
            let want = (3 * round * 10 + 3) as f32;
            assert_eq!(*sum, vec![want; 1 + round % 7]);
        }
        assert!(all[0] == all[1] && all[0] == all[2]);
    }

    #[test]
    fn who_leaves_lets_the_others_go() {
        let mut ends = ThreadGroup::new(2);
        let (second, first) = (ends.pop().unwrap(), ends.pop().unwrap());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(move || first.sum(&mut buffer(&[1.0]), false));
            second.leave();
            waiting.join().unwrap();
        });
    }
}
