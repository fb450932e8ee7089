//! [`KeyUse`]: what the holder of an API key has in use, against the key's limits.
//!
//! Requests and tokens are counted by buckets that fill at the limit's pace and hold a minute's worth. A request takes its
//! one at once. How many tokens it comes to is not known before they are there, so they are taken as they come, and a
//! bucket may fall below nothing: then the next request waits until it is filled again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use specattn_proto::Fault;

use crate::api_keys::KeyLimits;

/// When to try again where that depends on other requests' ends.
const RETRY_CONCURRENT: Duration = Duration::from_secs(1);

/// What one key's holder has in use.
#[derive(Debug)]
pub(crate) struct KeyUse {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    limits: KeyLimits,
    running: u32,
    requests: Bucket,
    tokens: Bucket,
}

/// A store that fills steadily up to a minute's worth. Empty below nothing: it was overdrawn.
#[derive(Debug)]
struct Bucket {
    level: f64,
    at: Instant,
}

impl Bucket {
    fn full(per_minute: Option<u32>, now: Instant) -> Self {
        Self {
            level: per_minute.map_or(0.0, f64::from),
            at: now,
        }
    }

    /// Fills it up to `now`; says what it holds.
    fn fill(&mut self, per_minute: u32, now: Instant) -> f64 {
        let per_minute = f64::from(per_minute);
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        self.level = (self.level + since * per_minute / 60.0).min(per_minute);
        self.at = now;
        self.level
    }

    /// The time until it holds `wanted`.
    fn wait(&self, wanted: f64, per_minute: u32) -> Duration {
        let seconds = (wanted - self.level).max(0.0) * 60.0 / f64::from(per_minute.max(1));
        Duration::from_secs_f64(seconds.min(3_600.0))
    }
}

/// A request of a key's holder, until dropped.
#[derive(Debug)]
pub(crate) struct KeyRequest(Arc<KeyUse>);

impl KeyUse {
    pub(crate) fn new(limits: KeyLimits, now: Instant) -> Self {
        Self {
            state: Mutex::new(State {
                limits,
                running: 0,
                requests: Bucket::full(limits.requests_per_minute, now),
                tokens: Bucket::full(limits.tokens_per_minute, now),
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock halfway through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The key's limits are these now. One that is new begins with a minute's worth.
    pub(crate) fn set_limits(&self, limits: KeyLimits, now: Instant) {
        let mut state = self.state();
        let before = std::mem::replace(&mut state.limits, limits);
        if before.requests_per_minute.is_none() {
            state.requests = Bucket::full(limits.requests_per_minute, now);
        }
        if before.tokens_per_minute.is_none() {
            state.tokens = Bucket::full(limits.tokens_per_minute, now);
        }
    }

    /// Begins a request.
    ///
    /// # Errors
    /// [`Fault::ResourceExhausted`] when the key is at a limit, with a hint when it will not be.
    pub(crate) fn begin(self: &Arc<Self>, now: Instant) -> Result<KeyRequest, Fault> {
        let refuse = |message: String, after: Duration| {
            Err(Fault::ResourceExhausted {
                message,
                retry_after: Some(after.max(Duration::from_millis(1))),
            })
        };
        let mut state = self.state();
        let limits = state.limits;
        if let Some(most) = limits.concurrent_requests
            && state.running >= most
        {
            let message = format!("this API key has {most} requests running, its most");
            return refuse(message, RETRY_CONCURRENT);
        }
        if let Some(rate) = limits.tokens_per_minute
            && state.tokens.fill(rate, now) <= 0.0
        {
            let message = format!("this API key has used its {rate} tokens a minute");
            return refuse(message, state.tokens.wait(1.0, rate));
        }
        if let Some(rate) = limits.requests_per_minute {
            if state.requests.fill(rate, now) < 1.0 {
                let message = format!("this API key has made its {rate} requests a minute");
                return refuse(message, state.requests.wait(1.0, rate));
            }
            state.requests.level -= 1.0;
        }
        state.running += 1;
        Ok(KeyRequest(Arc::clone(self)))
    }

    /// Whether it has nothing in use and its buckets have filled up, so that it can be forgotten.
    pub(crate) fn is_idle(&self, now: Instant) -> bool {
        let mut state = self.state();
        let limits = state.limits;
        let full = |bucket: &mut Bucket, limit: Option<u32>| {
            limit.is_none_or(|limit| bucket.fill(limit, now) >= f64::from(limit))
        };
        state.running == 0
            && full(&mut state.requests, limits.requests_per_minute)
            && full(&mut state.tokens, limits.tokens_per_minute)
    }
}

impl KeyRequest {
    /// Tokens were processed for it.
    pub(crate) fn spend(&self, tokens: usize) {
        let mut state = self.0.state();
        if let Some(rate) = state.limits.tokens_per_minute {
            state.tokens.fill(rate, Instant::now());
            // Sessions are bounded far below 2^52 tokens.
            state.tokens.level -= tokens as f64;
        }
    }
}

impl Drop for KeyRequest {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.running = state.running.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(limits: KeyLimits) -> (Arc<KeyUse>, Instant) {
        let now = Instant::now();
        (Arc::new(KeyUse::new(limits, now)), now)
    }

    fn hint(refused: Result<KeyRequest, Fault>) -> Duration {
        match refused.map(drop) {
            Err(Fault::ResourceExhausted {
                retry_after: Some(after),
                ..
            }) => after,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn requests_come_back_at_their_pace() {
        let (key, now) = key(KeyLimits {
            requests_per_minute: Some(6),
            ..KeyLimits::default()
        });
        for _ in 0..6 {
            key.begin(now).unwrap();
        }
        let after = hint(key.begin(now));
        assert_eq!(after, Duration::from_secs(10));
        assert!(key.begin(now + after).is_ok());
        hint(key.begin(now + after));
        assert!(!key.is_idle(now + after) && key.is_idle(now + Duration::from_secs(120)));
    }

    #[test]
    fn places_come_back_with_the_end_of_requests() {
        let (key, now) = key(KeyLimits {
            concurrent_requests: Some(2),
            ..KeyLimits::default()
        });
        let first = key.begin(now).unwrap();
        let _second = key.begin(now).unwrap();
        hint(key.begin(now));
        drop(first);
        assert!(key.begin(now).is_ok());
    }

    #[test]
    fn overdrawn_tokens_are_waited_for() {
        let limits = KeyLimits {
            tokens_per_minute: Some(60),
            ..KeyLimits::default()
        };
        let (key, now) = key(limits);
        let request = key.begin(now).unwrap();
        request.spend(90);
        let now = Instant::now();
        let after = hint(key.begin(now));
        assert!(
            after > Duration::from_secs(29) && after < Duration::from_secs(32),
            "{after:?}"
        );
        assert!(key.begin(now + after).is_ok());
        // Without the limit there is nothing to wait for.
        key.set_limits(KeyLimits::default(), now);
        assert!(key.begin(now).is_ok());
        key.set_limits(limits, now);
        assert!(key.begin(now).is_ok());
    }
}
