//! Kernels against the bytes they must move, or the operations they must do.

use anyhow::Result;
use specattn_engine::Crew;
use specattn_engine::backend::{AttentionShape, Backend, DType, Epilogue, HandOut, Linear};
use specattn_engine::cuda::selection::{RowSpec, Selector};
use specattn_engine::cuda::{Buffer, CudaBackend, PrefillKernel, ProductKernel};

use super::attention_case::AttentionCase;
use super::check_selection::attention_row;
use super::numbers::Numbers;
use super::timer::{in_graph_us, launched_us};

/// What the L2 cache must not hold: bytes of rotated inputs.
const ROTATED_BYTES: usize = 400 << 20;
/// The share of positions that the paper keeps.
const KEPT: f32 = 0.216;

/// (query heads, KV heads, batch, context): the rows of the verification tables, and what ranks of a split model have of them.
const VERIFICATION: [(usize, usize, usize, usize); 17] = [
    (32, 32, 1, 4096),
    (32, 32, 1, 16_384),
    (32, 32, 1, 32_768),
    (32, 32, 8, 4096),
    (32, 32, 8, 16_384),
    (32, 8, 1, 4096),
    (32, 8, 1, 16_384),
    (32, 8, 1, 32_768),
    (32, 8, 8, 4096),
    (32, 8, 8, 16_384),
    (32, 8, 8, 32_768),
    (32, 8, 32, 4096),
    (32, 8, 32, 16_384),
    (16, 4, 1, 32_768),
    (16, 4, 8, 32_768),
    (8, 2, 1, 32_768),
    (8, 2, 8, 32_768),
];

/// Attention of `tokens` tokens per sequence, dense and with 21.6 % kept.
///
/// # Errors
/// When the device fails.
pub fn verification(
    backend: &CudaBackend,
    dtype: DType,
    tokens: usize,
    bandwidth: f64,
) -> Result<()> {
    println!(
        "Attention, {tokens} tokens per sequence, head_dim 128, {dtype:?}; one list per sequence keeps {} %. Floor: bytes of the entries read at the copy's rate.\n",
        KEPT * 100.0
    );
    println!(
        "| heads q/kv | batch | context | floor dense µs | dense µs | in graph | ÷ floor | floor sparse µs | sparse µs | in graph | ÷ floor |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    let mut numbers = Numbers(17);
    for (num_heads, num_kv_heads, batch, context) in VERIFICATION {
        let shape = AttentionShape {
            num_heads,
            num_kv_heads,
            head_dim: 128,
        };
        let entry = 4 * shape.head_dim;
        let layer_bytes = batch * context * num_kv_heads * entry;
        let layers = (ROTATED_BYTES.div_ceil(layer_bytes)).clamp(2, 24);
        let mut case = AttentionCase::new(
            shape,
            &vec![(context - tokens, tokens); batch],
            layers,
            &mut numbers,
        );
        let kv = case.store(backend, dtype)?;
        backend.randomise_kv(&kv, 5)?;
        let mut cells = Vec::new();
        for sparse in [false, true] {
            if sparse {
                case.keep(KEPT, false, &mut numbers);
            }
            let pass = case.pass(false);
            let read: usize = pass
                .spans
                .iter()
                .map(|s| s.lists.as_ref().map_or(s.past, |l| l.lists()[0].len()) + tokens)
                .sum();
            let floor = (read * num_kv_heads * entry) as f64 / bandwidth * 1e6;
            let rows = batch * tokens;
            let mut q = backend.buffer();
            let qkv = numbers.rounded(rows * (num_heads + 2 * num_kv_heads) * 128, 1.0, dtype);
            case.store_rows(backend, (&kv, 0), &pass, &qkv, &mut q)?;
            let mut out = backend.buffer();
            let _turn = backend.begin(&pass, &shape, &mut Crew::alone());
            let mut attend = |i: usize| {
                case.attend(
                    backend,
                    (&kv, i % layers),
                    &pass,
                    (&q, &mut out),
                    &mut HandOut::default(),
                );
                Ok(())
            };
            let launched = launched_us(backend.device(), &mut attend)?;
            let graph = in_graph_us(backend.device(), &mut attend)?;
            backend.finish()?;
            cells.push(format!(
                "{floor:.1} | {launched:.1} | {graph:.1} | {:.2}",
                graph / floor
            ));
        }
        println!(
            "| {num_heads}/{num_kv_heads} | {batch} | {context} | {} |",
            cells.join(" | ")
        );
    }
    println!();
    Ok(())
}

/// Causal attention of prompt chunks.
///
/// # Errors
/// When the device fails.
pub fn prefill(backend: &CudaBackend, dtype: DType) -> Result<()> {
    println!("Prefill attention, causal, {dtype:?}: operations of the unmasked half only.\n");
    println!(
        "| heads q/kv | head_dim | cached before | tokens | by warps µs | TFLOP/s | by warpgroups µs | TFLOP/s |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    );
    let mut numbers = Numbers(19);
    for (num_heads, num_kv_heads, head_dim, past, tokens) in [
        (32, 32, 128, 0, 8192),
        (32, 8, 128, 0, 8192),
        (32, 8, 128, 0, 2048),
        (32, 8, 128, 30_720, 2048),
        (32, 8, 64, 0, 8192),
        (16, 8, 256, 0, 8192),
    ] {
        let shape = AttentionShape {
            num_heads,
            num_kv_heads,
            head_dim,
        };
        let case = AttentionCase::new(shape, &[(past, tokens)], 2, &mut numbers);
        let kv = case.store(backend, dtype)?;
        backend.randomise_kv(&kv, 5)?;
        let pass = case.pass(true);
        let mut q = backend.buffer();
        let qkv = numbers.rounded(
            tokens * (num_heads + 2 * num_kv_heads) * head_dim,
            1.0,
            dtype,
        );
        case.store_rows(backend, (&kv, 0), &pass, &qkv, &mut q)?;
        let mut out = backend.buffer();
        let pairs = tokens as f64 * past as f64 + tokens as f64 * (tokens as f64 + 1.0) / 2.0;
        let operations = 4.0 * pairs * (num_heads * head_dim) as f64;
        let _turn = backend.begin(&pass, &shape, &mut Crew::alone());
        let mut cells = Vec::new();
        for kernel in [PrefillKernel::Warps, PrefillKernel::Warpgroups] {
            backend.force_prefill_kernel(Some(kernel));
            let us = launched_us(backend.device(), |i| {
                case.attend(
                    backend,
                    (&kv, i % 2),
                    &pass,
                    (&q, &mut out),
                    &mut HandOut::default(),
                );
                Ok(())
            })?;
            backend.finish()?;
            cells.push(format!("{us:.0} | {:.0}", operations / us * 1e-6));
        }
        backend.force_prefill_kernel(None);
        println!(
            "| {num_heads}/{num_kv_heads} | {head_dim} | {past} | {tokens} | {} |",
            cells.join(" | ")
        );
    }
    println!();
    Ok(())
}

/// Top-p over rows of probabilities.
///
/// # Errors
/// When the device fails.
pub fn top_p(backend: &CudaBackend, bandwidth: f64) -> Result<()> {
    println!("Top-p selection, p 0.95. Floor: every row read once at the copy's rate.\n");
    println!(
        "| rows × n | kept | floor µs | µs | in graph | ÷ floor |\n| --- | --- | --- | --- | --- | --- |"
    );
    let mut numbers = Numbers(23);
    for (rows, length) in [
        (32usize, 4096usize),
        (32, 32_768),
        (704, 4096),
        (704, 32_768),
    ] {
        let sets = ((ROTATED_BYTES / 4).div_ceil(rows * length * 4)).clamp(2, 64);
        // About 9 % of the entries hold 95 % of the mass.
        let prototypes: Vec<Vec<f32>> = (0..64)
            .map(|_| attention_row(length, 3.6, &mut numbers))
            .collect();
        let flat: Vec<f32> = (0..rows)
            .flat_map(|r| prototypes[r % 64].iter().copied())
            .collect();
        let buffers = (0..sets)
            .map(|_| backend.buffer_of(&flat))
            .collect::<Result<Vec<_>, _>>()?;
        let mut selector = Selector::new(backend.device());
        let specs = vec![RowSpec { length, p: 0.95 }; rows];
        let mut select =
            |i: usize| Ok(selector.top_p(buffers[i % sets].memory(), length, &specs)?);
        let launched = launched_us(backend.device(), &mut select)?;
        let graph = in_graph_us(backend.device(), &mut select)?;
        let mut bits = vec![0u32; rows * selector.words()];
        selector.selected().read(0, &mut bits)?;
        let kept: u32 = bits.iter().map(|w| w.count_ones()).sum();
        let floor = (rows * length * 4) as f64 / bandwidth * 1e6;
        println!(
            "| {rows} × {length} | {:.1} % | {floor:.1} | {launched:.1} | {graph:.1} | {:.2} |",
            f64::from(kept) / (rows * length) as f64 * 100.0,
            graph / floor
        );
    }
    println!();
    Ok(())
}

/// Products of few rows with streamed weights, Llama-3-8B shapes.
///
/// # Errors
/// When the device fails.
pub fn products(backend: &CudaBackend, bandwidth: f64) -> Result<()> {
    println!(
        "Products, Llama-3-8B shapes, in a graph. Floor: weights read once at the copy's rate.\n"
    );
    println!(
        "| product | inputs → outputs | rows | floor µs | few rows' kernel µs | many rows' µs | split µs | by warpgroups µs | chosen µs | ÷ floor | cuBLAS µs |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    );
    type Shape = (&'static str, usize, &'static [usize], Epilogue);
    let shapes: [Shape; 6] = [
        ("qkv", 4096, &[4096, 1024, 1024], Epilogue::Store),
        (
            "qkv, groups of one",
            4096,
            &[4096, 4096, 4096],
            Epilogue::Store,
        ),
        ("output", 4096, &[4096], Epilogue::Add),
        ("gate, up", 4096, &[14_336, 14_336], Epilogue::SwiGlu),
        ("down", 14_336, &[4096], Epilogue::Add),
        ("head", 4096, &[128_256], Epilogue::Store),
    ];
    let mut numbers = Numbers(29);
    for (name, inputs, outputs, epilogue) in shapes {
        let bytes: usize = outputs.iter().map(|o| o * inputs * 2).sum();
        let sets = ROTATED_BYTES.div_ceil(bytes).clamp(1, 10);
        let weights: Vec<Vec<Linear<_>>> = (0..sets)
            .map(|set| {
                outputs
                    .iter()
                    .map(|&o| {
                        Ok(Linear {
                            weight: backend.random_matrix((o, inputs), 0.02, set as u32)?,
                            bias: None,
                        })
                    })
                    .collect::<Result<Vec<_>>>()
            })
            .collect::<Result<_>>()?;
        let norm = backend.weight_of(&vec![1.0; inputs], 1)?;
        for rows in [1usize, 5, 8, 16, 24, 32, 40, 64, 96, 160] {
            let hidden = backend.buffer_of(&numbers.rounded(rows * inputs, 1.0, DType::F32))?;
            // As every kernel takes it, and as the fastest one does.
            let normed = |kernel| {
                let mut x = backend.buffer();
                backend.force_product_kernel(kernel);
                backend.rms_norm(&hidden, &norm, 1e-5, &mut x);
                x
            };
            let x = normed(Some(ProductKernel::FewRows));
            let own_x = normed(None);
            let width = if epilogue == Epilogue::Store {
                outputs.iter().sum()
            } else {
                outputs[0]
            };
            let mut out = backend.buffer_of(&vec![0.0; rows * width])?;
            let mut us = |backend: &CudaBackend, x: &Buffer, bulk: bool| {
                in_graph_us(backend.device(), |i| {
                    let refs: Vec<&Linear<_>> = weights[i % sets].iter().collect();
                    backend.linear(x, &refs, epilogue, bulk, &mut out);
                    Ok(())
                })
            };
            let kernels = [
                ProductKernel::FewRows,
                ProductKernel::ManyRows,
                ProductKernel::ManyRowsSplit,
                ProductKernel::Warpgroups(None),
            ];
            let of_kernel = |kernel| {
                backend.force_product_kernel(Some(kernel));
                us(backend, &x, false)
            };
            let own = kernels.map(of_kernel);
            backend.force_product_kernel(None);
            let own: Vec<f64> = own.into_iter().collect::<Result<_>>()?;
            let chosen = us(backend, &own_x, false)?;
            // cuBLAS may need work space that capture refuses: a figure or none.
            let library = us(backend, &x, true).map_or("-".to_owned(), |us| format!("{us:.1}"));
            backend.finish()?;
            let floor = bytes as f64 / bandwidth * 1e6;
            println!(
                "| {name} | {inputs} → {outputs:?} | {rows} | {floor:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {chosen:.1} | {:.2} | {library} |",
                own[0],
                own[1],
                own[2],
                own[3],
                chosen / floor
            );
        }
    }
    println!();
    Ok(())
}
