//! [`Memory`]: whether long-lived processes grow.

use std::collections::BTreeMap;
use std::time::Duration;

/// The time in which a process takes the memory it works with: its caches are filled, its KV cache has been used once.
const WARM_UP: Duration = Duration::from_secs(30);

/// Shortest life, after that, over which growth is judged.
const SHORTEST: Duration = Duration::from_secs(25);

/// Growth that an allocator explains: a share, and bytes.
const TOLERANCE: (f64, f64) = (0.1, 16.0 * 1024.0 * 1024.0);

/// Samples of resident memory, by process.
#[derive(Debug, Default)]
pub struct Memory {
    lives: BTreeMap<(String, u32), Vec<(Duration, u64)>>,
}

/// A life that was long enough to be judged.
#[derive(Debug, Clone, PartialEq)]
pub struct Growth {
    /// Whose.
    pub name: String,
    /// How long it was watched after it had warmed up.
    pub watched: Duration,
    /// Median bytes of the first third of that time.
    pub early: f64,
    /// Median bytes of the last third.
    pub late: f64,
}

impl Growth {
    /// Whether it stays within what can be explained.
    pub fn is_flat(&self) -> bool {
        self.late <= self.early * (1.0 + TOLERANCE.0) + TOLERANCE.1
    }
}

impl std::fmt::Display for Growth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mib = |bytes: f64| bytes / f64::from(1 << 20);
        write!(
            f,
            "{}: {:.0} MiB, then {:.0} MiB within {:.0} s",
            self.name,
            mib(self.early),
            mib(self.late),
            self.watched.as_secs_f64()
        )
    }
}

impl Memory {
    /// Notes what `process` (a name and an id) holds `at` this time since the start.
    pub fn note(&mut self, process: (String, u32), at: Duration, bytes: u64) {
        self.lives.entry(process).or_default().push((at, bytes));
    }

    /// How long-lived processes grew.
    pub fn growths(&self) -> Vec<Growth> {
        self.lives
            .iter()
            .filter_map(|((name, _), samples)| growth(name, samples))
            .collect()
    }
}

fn growth(name: &str, samples: &[(Duration, u64)]) -> Option<Growth> {
    // Nobody's memory is touched before the first session: weights are mapped, the KV cache is reserved.
    let last = samples.last()?.1;
    let (at_work, _) = samples.iter().find(|(_, bytes)| *bytes >= last / 2)?;
    let warm = samples
        .iter()
        .position(|(at, _)| *at >= *at_work + WARM_UP)?;
    let samples = &samples[warm..];
    let watched = samples.last()?.0 - samples.first()?.0;
    if watched < SHORTEST || samples.len() < 6 {
        return None;
    }
    let third = samples.len() / 3;
    Some(Growth {
        name: name.to_owned(),
        watched,
        early: median(&samples[..third]),
        late: median(&samples[samples.len() - third..]),
    })
}

fn median(samples: &[(Duration, u64)]) -> f64 {
    let mut bytes: Vec<u64> = samples.iter().map(|sample| sample.1).collect();
    bytes.sort_unstable();
    bytes[bytes.len() / 2] as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grown(seconds: u64, bytes: impl Fn(u64) -> u64) -> Vec<Growth> {
        let mut memory = Memory::default();
        for second in 0..seconds {
            let process = ("a process".to_owned(), 7);
            memory.note(process, Duration::from_secs(second), bytes(second));
        }
        memory.growths()
    }

    #[test]
    fn a_leak_is_told_from_a_start() {
        const MIB: u64 = 1 << 20;
        let flat = grown(200, |second| 100 * MIB + second.min(25) * MIB);
        assert!(flat.len() == 1 && flat[0].is_flat(), "{flat:?}");
        let idle_at_first = grown(200, |second| if second < 90 { 12 } else { 52 } * MIB);
        assert!(idle_at_first[0].is_flat(), "{idle_at_first:?}");
        let leak = grown(200, |second| 100 * MIB + second * MIB);
        assert!(!leak[0].is_flat(), "{leak:?}");
    }

    #[test]
    fn short_lives_are_not_judged() {
        assert!(grown(40, |_| 1).is_empty() && grown(0, |_| 1).is_empty());
    }
}
