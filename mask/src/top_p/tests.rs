use proptest::prelude::*;

use super::*;

/// The definition, by brute force: every distinct positive entry as a threshold, in the module's arithmetic.
fn oracle(row: &[f32], p: f32) -> (Vec<usize>, f32) {
    let total = mass(row, f32::from_bits(1));
    let wanted = f64::from(p) * total;
    let mut thresholds: Vec<f32> = row.iter().copied().filter(|&x| x > 0.0).collect();
    thresholds.sort_by(|a, b| b.total_cmp(a));
    let found = thresholds.into_iter().find(|&t| mass(row, t) >= wanted);
    let Some(t) = found else {
        return (Vec::new(), f32::INFINITY);
    };
    ((0..row.len()).filter(|&i| row[i] >= t).collect(), t)
}

/// The documented sum, written plainly.
fn mass(row: &[f32], t: f32) -> f64 {
    let mut mass = 0.0f64;
    for block in row.chunks(2_048) {
        let mut lanes = [0.0f32; 16];
        for (i, &x) in block.iter().enumerate() {
            lanes[i % 16] += if x >= t { x } else { 0.0 };
        }
        let mut sum = 0.0f64;
        for lane in lanes {
            sum += f64::from(lane);
        }
        mass += sum;
    }
    mass
}

fn select(row: &[f32], p: f32) -> (PositionSet, Selection) {
    let mut set = PositionSet::new(row.len());
    let selection = select_top_p(row, p, &mut set);
    (set, selection)
}

/// Rows like attention: heavy tails over many octaves, with zeros and ties.
fn heavy_tailed() -> impl Strategy<Value = Vec<f32>> {
    let entry = prop_oneof![
        8 => (-30.0f32..0.0).prop_map(f32::exp),
        1 => Just(0.0f32),
        1 => Just(0.001f32),
    ];
    prop::collection::vec(entry, 0..5_000)
}

/// Any bit patterns at all: NaN, infinities, negative and subnormal numbers.
fn anything() -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(any::<u32>().prop_map(f32::from_bits), 0..300)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn equals_the_definition(row in heavy_tailed(), p in 0.01f32..1.0) {
        let (set, selection) = select(&row, p);
        let (expected, threshold) = oracle(&row, p);
        prop_assert_eq!(set.iter().collect::<Vec<_>>(), expected);
        prop_assert_eq!(selection.threshold, threshold);
        prop_assert_eq!(selection.kept, set.count());
        prop_assert!(selection.mass >= f64::from(p) * selection.total);
    }

    #[test]
    fn equals_the_definition_on_any_bits(row in anything(), p in 0.01f32..1.0) {
        let (set, _) = select(&row, p);
        prop_assert_eq!(set.iter().collect::<Vec<_>>(), oracle(&row, p).0);
    }

    #[test]
    fn any_p_is_harmless(row in anything(), p in any::<u32>().prop_map(f32::from_bits)) {
        let (set, selection) = select(&row, p);
        prop_assert_eq!(set.count(), selection.kept);
    }
}

#[test]
fn keeps_as_little_as_one_threshold_allows() {
    let (set, selection) = select(&[0.5, 0.1, 0.3, 0.1], 0.75);
    assert!(set.iter().eq([0, 2]));
    assert_eq!(selection.threshold, 0.3);
}

#[test]
fn equal_entries_stay_together() {
    let (set, _) = select(&[0.5, 0.1, 0.1, 0.1, 0.1, 0.1], 0.6);
    assert_eq!(set.count(), 6);
    let (set, _) = select(&[0.125; 4_096], 0.01);
    assert_eq!(set.count(), 4_096);
}

#[test]
fn rows_without_mass_select_nothing() {
    for row in [&[][..], &[0.0; 70], &[-1.0; 70], &[f32::NAN; 70]] {
        let (set, selection) = select(row, 0.9);
        assert!(set.is_empty());
        assert_eq!((selection.kept, selection.total), (0, 0.0));
    }
}

#[test]
fn full_mass_keeps_every_positive_entry() {
    let row = [1.0, 1e-30, 0.0, f32::from_bits(1), f32::NAN];
    assert!(select(&row, 1.0).0.iter().eq([0, 1, 3]));
}

#[test]
fn infinite_entries_win() {
    let row = [1.0, f32::INFINITY, 3.0, f32::INFINITY, f32::NEG_INFINITY];
    assert!(select(&row, 0.5).0.iter().eq([1, 3]));
}

#[test]
fn sums_that_overflow_are_handled() {
    let row = [f32::MAX; 100];
    assert_eq!(select(&row, 0.5).0.count(), 100);
}

#[test]
fn adds_to_the_set_and_keeps_within_it() {
    let mut set = PositionSet::from_positions(3, [1]);
    let selection = select_top_p(&[0.4, 0.0, 0.0, 0.6], 0.9, &mut set);
    assert!(set.iter().eq([0, 1]));
    assert_eq!(selection.kept, 2);
}
