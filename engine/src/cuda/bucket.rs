//! [`bucket`]: sizes that move in steps, so that what a session's next pass asks of the device is what the last one asked.

/// `n` rounded up to a multiple of `step`, a power of two, or of a larger one that adds an eighth at most. Never above the next
/// power of two, unless that is less than `step`.
pub(super) fn bucket(n: usize, step: usize) -> usize {
    let eighth = (n / 8).checked_ilog2().map_or(1, |bits| 1 << bits);
    n.next_multiple_of(eighth.max(step))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_few_and_near() {
        for step in [1, 64, 256] {
            let mut seen = Vec::new();
            for n in 0..=40_000 {
                let size = bucket(n, step);
                assert!(
                    size >= n && size.is_multiple_of(step) && size <= n + (n / 8).max(step - 1)
                );
                assert!(size <= n.next_power_of_two().max(step));
                assert_eq!(bucket(size, step), size);
                if seen.last() != Some(&size) {
                    seen.push(size);
                }
            }
            assert!(seen.is_sorted() && seen.len() < 120, "{}", seen.len());
        }
        assert_eq!(
            [0, 1, 9, 15, 16, 17].map(|n| bucket(n, 1)),
            [0, 1, 9, 15, 16, 18]
        );
        assert_eq!(
            [1, 256, 257, 4097, 32_001].map(|n| bucket(n, 256)),
            [256, 256, 512, 4608, 32_768]
        );
    }
}
