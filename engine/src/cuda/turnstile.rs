//! [`Turnstile`]: one forward at a time uses a device, and models that share it get about the same share of its time.
//!
//! Whoever has used less of it goes first. A model that steps fast, as a draft does, is away for a moment between two of its
//! steps; it is waited for, or the other, whose forwards are long, would come between any two of them. So a draft's round, or its
//! prompt, is not stretched by a forward of the target per step.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a model that left is expected back.
const AWAY: Duration = Duration::from_micros(400);
/// Most of the device's time by which one model counts as behind another: what was longer ago is forgotten.
const MEMORY: Duration = Duration::from_millis(40);

/// Where models wait for a device.
#[derive(Debug, Default)]
pub(super) struct Turnstile {
    users: Mutex<Users>,
    freed: Condvar,
}

/// Names a model among those that use a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct UserId(usize);

/// Those who use the device.
#[derive(Debug, Default)]
struct Users {
    /// By their names.
    all: Vec<User>,
    /// Who has it, since when.
    inside: Option<(usize, Instant)>,
}

#[derive(Debug, Default)]
struct User {
    /// Time that it has had, as far as it counts.
    used: Duration,
    waiting: bool,
    left: Option<Instant>,
}

impl Turnstile {
    /// A name for a model that will use the device.
    pub(super) fn register(&self) -> UserId {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        users.all.push(User::default());
        UserId(users.all.len() - 1)
    }

    /// Waits for the turn of `user`.
    pub(super) fn enter(&self, user: UserId) {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        users.all[user.0].waiting = true;
        loop {
            let now = Instant::now();
            match users.wait(user.0, now) {
                None => break,
                Some(Duration::MAX) => {
                    users = self
                        .freed
                        .wait(users)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                Some(time) => {
                    let woken = self.freed.wait_timeout(users, time);
                    users = woken.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
        users.all[user.0].waiting = false;
        users.inside = Some((user.0, Instant::now()));
    }

    /// Lets the next one in.
    pub(super) fn leave(&self) {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        users.leave(Instant::now());
        drop(users);
        self.freed.notify_all();
    }
}

impl Users {
    /// How long `user` still waits, by what is known at `now`; `None`: it may enter.
    fn wait(&self, user: usize, now: Instant) -> Option<Duration> {
        if self.inside.is_some() {
            return Some(Duration::MAX);
        }
        let own = self.all[user].used;
        let behind = |(number, other): &(usize, &User)| *number != user && other.used < own;
        let mut wait = None;
        for (_, other) in self.all.iter().enumerate().filter(behind) {
            if other.waiting {
                return Some(Duration::MAX);
            }
            // It may be back in a moment.
            let back = other.left.map(|left| left + AWAY);
            let more = back.and_then(|back| back.checked_duration_since(now));
            wait = wait.max(more.filter(|more| !more.is_zero()));
        }
        wait
    }

    fn leave(&mut self, now: Instant) {
        let Some((user, since)) = self.inside.take() else {
            return;
        };
        self.all[user].used += now.saturating_duration_since(since);
        self.all[user].left = Some(now);
        let most = self.all.iter().map(|user| user.used).max();
        let floor = most.unwrap_or_default().saturating_sub(MEMORY);
        for user in &mut self.all {
            user.used = user.used.max(floor) - floor;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Two models, of which the first has had `used` more of the device and left it just now.
    fn two(used: Duration, now: Instant) -> Users {
        let mut users = Users {
            all: vec![User::default(), User::default()],
            inside: Some((0, now - used)),
        };
        users.leave(now);
        users
    }

    #[test]
    fn who_has_used_less_goes_first() {
        let now = Instant::now();
        let mut users = two(10 * MS, now);
        users.all[1].waiting = true;
        assert_eq!(users.wait(0, now), Some(Duration::MAX));
        assert_eq!(users.wait(1, now), None);
    }

    #[test]
    fn a_model_that_just_left_and_is_behind_is_waited_for_a_moment() {
        let now = Instant::now();
        let mut users = two(10 * MS, now);
        users.inside = Some((1, now));
        assert_eq!(users.wait(0, now), Some(Duration::MAX));
        // The second has had 2 ms of the first one's 10.
        let left = now + 2 * MS;
        users.leave(left);
        assert_eq!(users.wait(0, left), Some(AWAY));
        assert_eq!(users.wait(1, left), None);
        // It stays away, or has had as much.
        assert_eq!(users.wait(0, left + AWAY), None);
        users.inside = Some((1, left));
        users.leave(left + 9 * MS);
        assert_eq!(users.wait(0, left + 9 * MS), None);
    }

    #[test]
    fn a_long_rest_saves_nothing_up() {
        let now = Instant::now();
        let mut users = two(1000 * MS, now);
        assert_eq!(users.all[0].used, MEMORY);
        users.inside = Some((1, now));
        users.leave(now + MEMORY);
        // Even again: the first one waits no longer.
        assert_eq!(users.wait(0, now + MEMORY), None);
    }

    #[test]
    fn one_at_a_time_is_inside() {
        let turnstile = Turnstile::default();
        let inside = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let user = turnstile.register();
                    for _ in 0..50 {
                        turnstile.enter(user);
                        assert_eq!(inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                        inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                        turnstile.leave();
                    }
                });
            }
        });
    }
}
