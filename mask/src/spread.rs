//! [`spread`]: an entry's mass counts, less and less, for its neighbours too.
//!
//! A small draft finds the right place in a text more often than the right token of it: what the target reads lies beside
//! what the draft reads. Spreading a row before the selection keeps neighbours of heavy entries rather than lone entries
//! of middling weight (measured in bench/quality/README.md).

/// How many positions to either side an entry's mass reaches.
pub const REACH: usize = 4;

/// Writes `out[i] = Σ share^|d| · row[i + d]` over `|d| <= REACH`, as long as `row`; beyond its ends there is nothing.
pub fn spread(row: &[f32], share: f32, out: &mut Vec<f32>) {
    out.clear();
    out.extend_from_slice(row);
    let mut weight = share;
    // One plain loop per distance and side: the compiler makes vectors of each.
    for distance in 1..=REACH.min(row.len().saturating_sub(1)) {
        let within = row.len() - distance;
        for (sum, &x) in out[..within].iter_mut().zip(&row[distance..]) {
            *sum += weight * x;
        }
        for (sum, &x) in out[distance..].iter_mut().zip(&row[..within]) {
            *sum += weight * x;
        }
        weight *= share;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_its_definition() {
        for len in [0usize, 1, 2, 3, 5, 40] {
            let row: Vec<f32> = (0..len).map(|i| ((i * 7) % 5) as f32).collect();
            let mut out = vec![9.0; 3];
            spread(&row, 0.5, &mut out);
            assert_eq!(out.len(), len);
            for (i, &found) in out.iter().enumerate() {
                let near = i.saturating_sub(REACH)..len.min(i + REACH + 1);
                let expected: f32 = near
                    .map(|j| 0.5f32.powi(i.abs_diff(j) as i32) * row[j])
                    .sum();
                assert!((found - expected).abs() < 1e-5, "{len}, {i}");
            }
        }
    }

    #[test]
    fn no_share_leaves_the_row() {
        let mut out = Vec::new();
        spread(&[0.5, 0.25], 0.0, &mut out);
        assert_eq!(out, [0.5, 0.25]);
    }
}
