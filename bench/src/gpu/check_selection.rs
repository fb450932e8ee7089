//! Top-p against plain loops over the same fixed-point masses.

use anyhow::Result;
use specattn_engine::cuda::CudaBackend;
use specattn_engine::cuda::selection::{RowSpec, Selector};

use super::numbers::Numbers;

/// Units of a mass, as in the kernel.
const UNIT: f32 = 2_147_483_648.0;

fn mass(x: f32) -> u32 {
    (x.clamp(0.0, 1.0) * UNIT).round_ties_even() as u32
}

/// The positions that a row's selection holds, by sorting.
fn selected(row: &[f32], p: f32) -> Vec<bool> {
    let masses: Vec<u32> = row.iter().map(|&x| mass(x)).collect();
    let total: u64 = masses.iter().map(|&m| u64::from(m)).sum();
    let wanted = ((f64::from(p) * total as f64).ceil() as u64).min(total);
    let mut order: Vec<u32> = masses.iter().copied().filter(|&m| m > 0).collect();
    order.sort_unstable_by(|a, b| b.cmp(a));
    let mut sum = 0;
    let mut threshold = u32::MAX;
    for m in order {
        if sum >= wanted && m != threshold {
            break;
        }
        sum += u64::from(m);
        threshold = m;
    }
    if wanted == 0 {
        threshold = u32::MAX;
    }
    masses.iter().map(|&m| m >= threshold).collect()
}

/// A row like attention's: a softmax of scores, peaked by `sharpness`.
pub fn attention_row(length: usize, sharpness: f32, numbers: &mut Numbers) -> Vec<f32> {
    let mut row: Vec<f32> = (0..length)
        .map(|_| {
            let z: f32 = (0..6).map(|_| numbers.uniform()).sum::<f32>() - 3.0;
            (z * sharpness).exp()
        })
        .collect();
    let total: f64 = row.iter().map(|&x| f64::from(x)).sum();
    for x in &mut row {
        *x = (f64::from(*x) / total) as f32;
    }
    row
}

/// Prints what was checked; true when every bit is right.
///
/// # Errors
/// When the device fails.
pub fn check(backend: &CudaBackend) -> Result<bool> {
    let mut fine = true;
    for length in [
        1usize, 5, 31, 32, 33, 100, 1000, 4096, 4097, 8000, 9000, 16_384, 20_000, 32_768,
    ] {
        fine &= check_length(backend, length)?;
    }
    println!(
        "selection: {}\n",
        if fine { "every bit right" } else { "WRONG" }
    );
    Ok(fine)
}

/// [`check`] for rows of one length.
///
/// # Errors
/// When the device fails.
pub fn check_length(backend: &CudaBackend, length: usize) -> Result<bool> {
    let mut numbers = Numbers(13);
    let mut selector = Selector::new(backend.device());
    let mut wrong = 0;
    let stride = length.next_multiple_of(4) + 4;
    for p in [0.5, 0.9, 0.95, 0.999, 1.0] {
        let mut rows: Vec<Vec<f32>> = (0..6)
            .map(|i| attention_row(length, [0.0, 0.5, 2.0, 4.0, 8.0, 1.0][i], &mut numbers))
            .collect();
        // A row of ties, and one with entries that must not count.
        rows[3]
            .iter_mut()
            .enumerate()
            .for_each(|(i, x)| *x = if i % 3 == 0 { 0.5 / length as f32 } else { 0.0 });
        rows[5][0] = f32::NAN;
        rows[5][length / 2] = -1.0;
        let mut flat = vec![0.25; rows.len() * stride];
        for (to, row) in flat.chunks_exact_mut(stride).zip(&rows) {
            to[..length].copy_from_slice(row);
        }
        let buffer = backend.buffer_of(&flat)?;
        let specs = vec![RowSpec { length, p }; rows.len()];
        selector.top_p(buffer.memory(), stride, &specs)?;
        let words = selector.words();
        let mut bits = vec![0u32; rows.len() * words];
        selector.selected().read(0, &mut bits)?;
        let want: Vec<Vec<bool>> = rows.iter().map(|r| selected(r, p)).collect();
        for (r, want) in want.iter().enumerate() {
            let got = (0..words * 32).map(|i| bits[r * words + i / 32] >> (i % 32) & 1 == 1);
            let want = want
                .iter()
                .copied()
                .chain(std::iter::repeat(false))
                .take(words * 32);
            if !got.eq(want) {
                wrong += 1;
                println!("top-p: row {r} of length {length}, p {p} is wrong");
            }
        }
    }
    Ok(wrong == 0)
}
