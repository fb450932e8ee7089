//! Attention kernels against softmax attention in f64 over a grid of odd shapes.

use anyhow::Result;
use specattn_engine::backend::{AttentionShape, Backend, Capture, DType, HandOut, Masses};
use specattn_engine::cuda::{CudaBackend, PrefillKernel};
use specattn_engine::{AttentionRows, Crew};

use super::attention_case::{AttentionCase, SpanCase};
use super::numbers::{Numbers, relative_error};

/// Projected rows of one sequence, `[positions, (num_heads + 2 * num_kv_heads) * head_dim]`.
type Projected = Vec<f32>;

/// What attention should give: outputs of the pass's tokens, and the last token's probabilities per head.
struct Expected {
    out: Vec<f64>,
    probs: Vec<f64>,
    /// Mean probability of the cached keys that each KV head reads.
    masses: Vec<f64>,
}

fn expected(shape: &AttentionShape, span: &SpanCase, layer: usize, rows: &Projected) -> Expected {
    let (heads, kv_heads, dim) = (shape.num_heads, shape.num_kv_heads, shape.head_dim);
    let width = (heads + 2 * kv_heads) * dim;
    let at = |position: usize, head: usize| &rows[position * width + head * dim..][..dim];
    let length = span.past + span.tokens;
    let mut out = vec![0.0; span.tokens * heads * dim];
    let mut probs = vec![0.0; heads * length];
    let mut means = vec![vec![0.0; span.past]; kv_heads];
    let share = 1.0 / (span.tokens * heads / kv_heads) as f64;
    for token in 0..span.tokens {
        for head in 0..heads {
            let kv_head = head / (heads / kv_heads);
            let listed: Vec<usize> = match &span.lists {
                None => (0..span.past).collect(),
                Some(l) => l.lists[l.of_head[layer * kv_heads + kv_head] as usize]
                    .iter()
                    .collect(),
            };
            let seen: Vec<usize> = listed
                .into_iter()
                .chain(span.past..=span.past + token)
                .collect();
            let q = at(span.past + token, head);
            let scores: Vec<f64> = seen
                .iter()
                .map(|&p| {
                    let k = at(p, heads + kv_head);
                    let dot: f64 = q
                        .iter()
                        .zip(k)
                        .map(|(&a, &b)| f64::from(a) * f64::from(b))
                        .sum();
                    dot / (dim as f64).sqrt()
                })
                .collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
            let to = &mut out[(token * heads + head) * dim..][..dim];
            for (&p, s) in seen.iter().zip(&scores) {
                let weight = (s - top).exp() / total;
                for (to, &v) in to.iter_mut().zip(at(p, heads + kv_heads + kv_head)) {
                    *to += weight * f64::from(v);
                }
                if p < span.past {
                    means[kv_head][p] += weight * share;
                }
                if token + 1 == span.tokens {
                    probs[head * length + p] = weight;
                }
            }
        }
    }
    let masses = means
        .iter()
        .enumerate()
        .flat_map(|(kv_head, means)| match &span.lists {
            None => means.clone(),
            Some(l) => l.lists[l.of_head[layer * kv_heads + kv_head] as usize]
                .iter()
                .map(|p| means[p])
                .collect(),
        })
        .collect();
    Expected { out, probs, masses }
}

/// Runs one case; (error of the outputs, of the captured rows).
fn run(
    backend: &CudaBackend,
    case: &AttentionCase,
    dtype: DType,
    bulk: bool,
    numbers: &mut Numbers,
) -> Result<(f64, f64)> {
    let shape = &case.shape;
    let layer = case.layers - 1;
    let width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim;
    let kv = case.store(backend, dtype)?;
    let projected: Vec<Projected> = case
        .spans
        .iter()
        .map(|s| numbers.rounded((s.past + s.tokens) * width, 1.5, dtype))
        .collect();
    let mut q = backend.buffer();
    // What another sequence may have left in the blocks.
    let spoilt = case.whole_blocks_pass();
    let nothing = vec![f32::NAN; spoilt.tokens.len() * width];
    case.store_rows(backend, (&kv, layer), &spoilt, &nothing, &mut q)?;
    let past: Vec<f32> = case
        .spans
        .iter()
        .zip(&projected)
        .flat_map(|(s, p)| &p[..s.past * width])
        .copied()
        .collect();
    if !past.is_empty() {
        case.store_rows(backend, (&kv, layer), &case.past_pass(), &past, &mut q)?;
    }
    let own: Vec<f32> = case
        .spans
        .iter()
        .zip(&projected)
        .flat_map(|(s, p)| &p[s.past * width..])
        .copied()
        .collect();
    let mut pass = case.pass(bulk);
    case.store_rows(backend, (&kv, layer), &pass, &own, &mut q)?;
    let want: Vec<Expected> = case
        .spans
        .iter()
        .zip(&projected)
        .map(|(s, p)| expected(shape, s, layer, p))
        .collect();
    let want_out: Vec<f64> = want.iter().flat_map(|w| &w.out).copied().collect();

    let mut out = backend.buffer();
    let mut read = Vec::new();
    {
        let _turn = backend.begin(&pass, shape, &mut Crew::alone());
        let mut nothing = HandOut::default();
        case.attend(backend, (&kv, layer), &pass, (&q, &mut out), &mut nothing);
        backend.read(&out, &mut read)?;
    }
    let error = relative_error(&read, &want_out);
    if bulk {
        return Ok((error, 0.0));
    }
    // Again, with every span captured: outputs must be the same bits.
    pass.captures = (0..case.spans.len()).collect();
    let mut rows: Vec<AttentionRows> = case
        .spans
        .iter()
        .map(|s| AttentionRows {
            layers: vec![layer],
            num_heads: shape.num_heads,
            kv_len: s.past + s.tokens,
            probs: vec![0.0; shape.num_heads * (s.past + s.tokens)],
        })
        .collect();
    // Of all layers, of which one is run.
    let heads = shape.num_kv_heads;
    let this_layer = layer * heads..(layer + 1) * heads;
    let mut mass_rows: Vec<Vec<Vec<f32>>> =
        vec![vec![Vec::new(); case.layers * heads]; case.spans.len()];
    let captures = rows.iter_mut().enumerate();
    let masses = mass_rows.iter_mut().enumerate();
    let mut wanted = HandOut {
        captures: captures
            .map(|(span, rows)| Capture {
                span,
                slot: 0,
                rows,
            })
            .collect(),
        masses: masses
            .map(|(span, of_head)| Masses {
                span,
                of_head: &mut of_head[this_layer.clone()],
            })
            .collect(),
    };
    let mut again = Vec::new();
    let _turn = backend.begin(&pass, shape, &mut Crew::alone());
    case.attend(backend, (&kv, layer), &pass, (&q, &mut out), &mut wanted);
    let all_layers = mass_rows.iter_mut().enumerate();
    let mut all_layers: Vec<Masses<'_>> = all_layers
        .map(|(span, of_head)| Masses { span, of_head })
        .collect();
    backend.masses(&pass, &mut all_layers)?;
    backend.read(&out, &mut again)?;
    let same = read
        .iter()
        .zip(&again)
        .all(|(a, b)| a.to_bits() == b.to_bits());
    let got: Vec<f32> = rows.iter().flat_map(|r| &r.probs).copied().collect();
    let probs: Vec<f64> = want.iter().flat_map(|w| &w.probs).copied().collect();
    let got_masses: Vec<f32> = mass_rows
        .iter()
        .flat_map(|of_head| of_head[this_layer.clone()].iter().flatten())
        .copied()
        .collect();
    let masses: Vec<f64> = want.iter().flat_map(|w| &w.masses).copied().collect();
    let handed_out = relative_error(&got, &probs).max(relative_error(&got_masses, &masses));
    Ok((error, if same { handed_out } else { f64::INFINITY }))
}

/// (past, tokens) of sequences. The last ones have so many units that some are padding.
const RAGGED: [&[(usize, usize)]; 5] = [
    &[(0, 1)],
    &[(1, 5), (63, 1), (700, 3)],
    &[(64, 16), (1025, 5)],
    &[(2100, 2), (17, 9), (511, 1), (1023, 1)],
    &[(30, 1); 21],
];

/// A table of worst errors; true when all are within bounds.
///
/// # Errors
/// When the device fails.
pub fn check(backend: &CudaBackend, dtype: DType) -> Result<bool> {
    println!(
        "| attention, {dtype:?} | heads | head_dim | dense | lists | full list | captured | prefill | by warpgroups |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    );
    let mut fine = true;
    for head_dim in [16, 48, 64, 96, 128, 256] {
        for (num_heads, num_kv_heads) in [(4, 4), (8, 2), (7, 1), (16, 1)] {
            let shape = AttentionShape {
                num_heads,
                num_kv_heads,
                head_dim,
            };
            fine &= check_shape(backend, dtype, shape)?;
        }
    }
    println!();
    Ok(fine)
}

/// [`check`]'s row of one shape.
///
/// # Errors
/// When the device fails.
pub fn check_shape(backend: &CudaBackend, dtype: DType, shape: AttentionShape) -> Result<bool> {
    let mut numbers = Numbers(7);
    let mut worst = [0.0f64; 6];
    let mut note = |i: usize, e: f64| worst[i] = worst[i].max(e);
    // More blocks than run at once, of two tiles of rows and two KV heads: queries stay in registers, but where they are captured.
    let crowd = vec![(30, 5); backend.device().multiprocessors() as usize + 8];
    let crowd = (shape.head_dim == 128 && (shape.num_heads, shape.num_kv_heads) == (8, 2))
        .then_some(crowd.as_slice());
    for lengths in RAGGED.into_iter().chain(crowd) {
        let mut case = AttentionCase::new(shape, lengths, 2, &mut numbers);
        let (e, c) = run(backend, &case, dtype, false, &mut numbers)?;
        note(0, e);
        note(3, c);
        for (kept, per_head) in [(0.2, true), (0.0, false), (0.7, false)] {
            case.keep(kept, per_head, &mut numbers);
            let (e, c) = run(backend, &case, dtype, false, &mut numbers)?;
            note(1, e);
            note(3, c);
        }
        case.keep(2.0, false, &mut numbers);
        note(2, run(backend, &case, dtype, false, &mut numbers)?.0);
    }
    for (slot, kernel) in [(4, PrefillKernel::Warps), (5, PrefillKernel::Warpgroups)] {
        backend.force_prefill_kernel(Some(kernel));
        for lengths in [
            [(0usize, 1usize)].as_slice(),
            &[(0, 33)],
            &[(0, 200)],
            &[(130, 129)],
            &[(777, 65)],
            &[(896, 384)],
            &[(5, 64), (64, 40), (0, 300)],
        ] {
            let case = AttentionCase::new(shape, lengths, 1, &mut numbers);
            note(slot, run(backend, &case, dtype, true, &mut numbers)?.0);
        }
    }
    backend.force_prefill_kernel(None);
    let cells: Vec<String> = worst.iter().map(|e| format!("{e:.1e}")).collect();
    println!(
        "| | {}/{} | {} | {} |",
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        cells.join(" | ")
    );
    Ok(worst.iter().all(|&e| e < 1e-2))
}
