//! The paper's layer map: one draft layer per target layer, in order, by dynamic programming.
//!
//! Among all maps that never step back to an earlier draft layer, the one with the least total divergence.

/// For each target layer, its draft layer: non-decreasing, with the least sum of `cost[target layer][draft layer]`. Of
/// equal maps the one with earlier layers wins.
///
/// # Panics
/// When rows of `cost` are empty or differ in length.
pub fn monotone_map(cost: &[Vec<f64>]) -> Vec<usize> {
    let Some(width) = cost.first().map(Vec::len) else {
        return Vec::new();
    };
    // best[d]: least cost of the layers so far when the last of them takes a draft layer of at most d.
    let mut best = vec![0.0; width];
    // choice[l][d]: the draft layer of l in that map.
    let mut choice: Vec<Vec<usize>> = Vec::new();
    for row in cost {
        assert_eq!(row.len(), width, "one cost per draft layer");
        let mut chosen = Vec::with_capacity(width);
        let mut least = (f64::INFINITY, 0);
        let next: Vec<f64> = (0..width)
            .map(|d| {
                let sum = best[d] + row[d];
                if sum < least.0 {
                    least = (sum, d);
                }
                chosen.push(least.1);
                least.0
            })
            .collect();
        best = next;
        choice.push(chosen);
    }
    let mut bound = width - 1;
    let mut map: Vec<usize> = choice
        .iter()
        .rev()
        .map(|chosen| {
            bound = chosen[bound];
            bound
        })
        .collect();
    map.reverse();
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    fn total(cost: &[Vec<f64>], map: &[usize]) -> f64 {
        map.iter().zip(cost).map(|(&d, row)| row[d]).sum()
    }

    /// Least total over all non-decreasing maps, by trying each.
    fn least_by_search(cost: &[Vec<f64>], from: usize) -> f64 {
        let Some((row, rest)) = cost.split_first() else {
            return 0.0;
        };
        (from..row.len())
            .map(|d| row[d] + least_by_search(rest, d))
            .fold(f64::INFINITY, f64::min)
    }

    #[test]
    fn is_the_best_of_all_ordered_maps() {
        let mut state = 7u64;
        let mut random = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 40) as f64 / (1u64 << 24) as f64
        };
        for (layers, width) in [(1, 1), (4, 3), (6, 2), (5, 5), (2, 6)] {
            let cost: Vec<Vec<f64>> = (0..layers)
                .map(|_| (0..width).map(|_| random()).collect())
                .collect();
            let map = monotone_map(&cost);
            assert!(map.windows(2).all(|w| w[0] <= w[1]), "{map:?}");
            assert!((total(&cost, &map) - least_by_search(&cost, 0)).abs() < 1e-12);
        }
        assert!(monotone_map(&[]).is_empty());
    }
}
