//! Norm and products against f64, and a row's bits against the same row alone.

use anyhow::Result;
use specattn_engine::backend::{Backend, DType, Epilogue, Linear};
use specattn_engine::cuda::{Buffer, CudaBackend, ProductKernel, WARPGROUP_CUTS, Weight};

use super::numbers::{Numbers, relative_error, round};

struct Matrix {
    values: Vec<f32>,
    bias: Option<Vec<f32>>,
    outputs: usize,
}

/// x[rows, inputs] through a norm, as the 16-bit rows that products take, and the rounded values.
fn normed(
    backend: &CudaBackend,
    x: &[f32],
    weight: &[f32],
    dtype: DType,
) -> Result<(Buffer, Vec<f32>, f64)> {
    let (hidden, norm) = (backend.buffer_of(x)?, backend.weight_of(weight, 1)?);
    let mut out = backend.buffer();
    backend.rms_norm(&hidden, &norm, 1e-5, &mut out);
    let mut got = Vec::new();
    backend.read(&out, &mut got)?;
    let width = weight.len();
    let want: Vec<f64> = x
        .chunks_exact(width)
        .flat_map(|row| {
            let squares: f64 = row.iter().map(|&v| f64::from(v).powi(2)).sum();
            let scale = 1.0 / (squares / width as f64 + 1e-5).sqrt();
            row.iter()
                .zip(weight)
                .map(move |(&v, &w)| f64::from(v) * scale * f64::from(w))
        })
        .collect();
    debug_assert!(got.iter().all(|&g| round(g, dtype) == g));
    let error = relative_error(&got, &want);
    Ok((out, got, error))
}

fn product(x: &[f32], inputs: usize, m: &Matrix) -> Vec<f64> {
    x.chunks_exact(inputs)
        .flat_map(|row| {
            m.values
                .chunks_exact(inputs)
                .enumerate()
                .map(move |(o, w)| {
                    let dot: f64 = row
                        .iter()
                        .zip(w)
                        .map(|(&a, &b)| f64::from(a) * f64::from(b))
                        .sum();
                    dot + m.bias.as_ref().map_or(0.0, |b| f64::from(b[o]))
                })
        })
        .collect()
}

/// A table of worst errors; true when all are within bounds.
///
/// # Errors
/// When the device fails.
pub fn check(backend: &CudaBackend, dtype: DType) -> Result<bool> {
    println!(
        "| products, {dtype:?} | inputs | outputs | norm | store | add | gated | cuBLAS | rows alone |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    );
    let mut fine = true;
    for inputs in [8, 64, 72, 192, 384, 896, 4096] {
        for outputs in [[24usize, 8, 40], [384, 128, 128], [100, 36, 20]] {
            fine &= check_shape(backend, dtype, inputs, outputs)?;
        }
    }
    fine &= check_crowd(backend, dtype)?;
    println!();
    Ok(fine)
}

/// [`check`]'s row of products with more blocks than there are multiprocessors, and more tiles than rings have stages: that all warpgroup
/// kernels give the bits of the kernel for few rows.
fn check_crowd(backend: &CudaBackend, dtype: DType) -> Result<bool> {
    let mut numbers = Numbers(13);
    // The coarsest blocks have 128 outputs.
    let many = 128 * backend.device().multiprocessors() as usize + 104;
    let (inputs, outputs) = (2312, [many, 40]);
    let mut linear = |outputs: usize| -> Result<Linear<Weight>> {
        let values = numbers.rounded(outputs * inputs, 0.5, dtype);
        let bias = numbers.rounded(outputs, 1.0, DType::F32);
        Ok(Linear {
            weight: backend.weight_of(&values, outputs)?,
            bias: Some(backend.weight_of(&bias, 1)?),
        })
    };
    let [many, twin, few] = [
        linear(outputs[0])?,
        linear(outputs[0])?,
        linear(outputs[1])?,
    ];
    let mut same = true;
    for rows in [9usize, 20, 40, 45, 64, 70, 90, 120, 160] {
        let x = numbers.rounded(rows * inputs, 2.0, DType::F32);
        let (x, _, _) = normed(backend, &x, &vec![1.0; inputs], dtype)?;
        let before = numbers.rounded(rows * outputs[0], 3.0, DType::F32);
        let bits = |kernel, epilogue| -> Result<Vec<u32>> {
            let (projections, mut out) = match epilogue {
                Epilogue::Store => (vec![&many, &few], backend.buffer()),
                Epilogue::Add => (vec![&many], backend.buffer_of(&before)?),
                Epilogue::SwiGlu => (vec![&many, &twin], backend.buffer()),
            };
            backend.force_product_kernel(Some(kernel));
            backend.linear(&x, &projections, epilogue, false, &mut out);
            let mut got = Vec::new();
            backend.read(&out, &mut got)?;
            Ok(got.iter().map(|v| v.to_bits()).collect())
        };
        for epilogue in [Epilogue::Store, Epilogue::Add, Epilogue::SwiGlu] {
            let expected = bits(ProductKernel::FewRows, epilogue)?;
            for cut in 0..WARPGROUP_CUTS {
                same &= bits(ProductKernel::Warpgroups(Some(cut)), epilogue)? == expected;
            }
        }
    }
    backend.force_product_kernel(None);
    println!(
        "| | {inputs} | {outputs:?} | | | | | | {} |",
        if same { "same bits" } else { "DIFFER" }
    );
    Ok(same)
}

/// [`check`]'s row of one shape.
///
/// # Errors
/// When the device fails.
pub fn check_shape(
    backend: &CudaBackend,
    dtype: DType,
    inputs: usize,
    outputs: [usize; 3],
) -> Result<bool> {
    let mut numbers = Numbers(11);
    let mut worst = [0.0f64; 5];
    let mut alone = true;
    let matrices: Vec<Matrix> = outputs
        .iter()
        .enumerate()
        .map(|(i, &outputs)| Matrix {
            values: numbers.rounded(outputs * inputs, 0.5, dtype),
            bias: (i != 1).then(|| numbers.rounded(outputs, 1.0, DType::F32)),
            outputs,
        })
        .collect();
    let linears: Vec<Linear<Weight>> = matrices
        .iter()
        .map(|m| {
            let bias = m
                .bias
                .as_ref()
                .map(|b| backend.weight_of(b, 1))
                .transpose()?;
            Ok(Linear {
                weight: backend.weight_of(&m.values, m.outputs)?,
                bias,
            })
        })
        .collect::<Result<_>>()?;
    // The gated product's two matrices have one shape.
    let twin = Linear {
        weight: backend.weight_of(&matrices[0].values, outputs[0])?,
        bias: None,
    };
    let refs: Vec<&Linear<Weight>> = linears.iter().collect();
    for rows in [
        1usize, 2, 7, 8, 9, 20, 33, 40, 45, 64, 70, 90, 120, 160, 300,
    ] {
        let x = numbers.rounded(rows * inputs, 2.0, DType::F32);
        let weight = numbers.rounded(inputs, 1.0, DType::F32);
        // Rows as all kernels take them, and as the fastest one for so many does.
        backend.force_product_kernel(Some(ProductKernel::FewRows));
        let (a, a_values, norm_error) = normed(backend, &x, &weight, dtype)?;
        backend.force_product_kernel(None);
        let (own_a, own_values, _) = normed(backend, &x, &weight, dtype)?;
        alone &= own_values == a_values;
        worst[0] = worst[0].max(norm_error);
        let wants: Vec<Vec<f64>> = matrices
            .iter()
            .map(|m| product(&a_values, inputs, m))
            .collect();
        let want: Vec<f64> = (0..rows)
            .flat_map(|r| {
                wants
                    .iter()
                    .zip(&outputs)
                    .flat_map(move |(w, &o)| w[r * o..(r + 1) * o].to_vec())
            })
            .collect();
        let (mut out, mut got) = (backend.buffer(), Vec::new());
        // The last row alone takes the kernel that is the fastest for one.
        let last = &x[(rows - 1) * inputs..];
        let (last, _, _) = normed(backend, last, &weight, dtype)?;
        let by_mma = [
            ProductKernel::FewRows,
            ProductKernel::ManyRows,
            ProductKernel::ManyRowsSplit,
        ];
        let cuts = (0..WARPGROUP_CUTS).map(|cut| ProductKernel::Warpgroups(Some(cut)));
        let streaming = by_mma
            .into_iter()
            .chain(cuts)
            .map(Some)
            .chain([None])
            .map(|kernel| (kernel, false, 1));
        let before = numbers.rounded(rows * outputs[1], 3.0, DType::F32);
        // What the kernel for few rows gave, by epilogue.
        let mut expected: [Vec<u32>; 3] = Default::default();
        for (kernel, bulk, slot) in streaming.chain([(Some(ProductKernel::FewRows), true, 4)]) {
            let a = if kernel.is_some() { &a } else { &own_a };
            let linear =
                |x: &Buffer, projections: &[&Linear<Weight>], epilogue, bulk, out: &mut Buffer| {
                    backend.force_product_kernel(kernel);
                    backend.linear(x, projections, epilogue, bulk, out);
                    backend.force_product_kernel(None);
                };
            linear(a, &refs, Epilogue::Store, bulk, &mut out);
            backend.read(&out, &mut got)?;
            worst[slot] = worst[slot].max(relative_error(&got, &want));
            let mut one = backend.buffer();
            let mut last_is = |got: &[f32], one: &Buffer, epilogue: usize| -> Result<()> {
                let mut row = Vec::new();
                backend.read(one, &mut row)?;
                let bits =
                    |numbers: &[f32]| -> Vec<u32> { numbers.iter().map(|x| x.to_bits()).collect() };
                let (got, expected) = (bits(got), &mut expected[epilogue]);
                alone &=
                    bulk || got.ends_with(&bits(&row)) && (expected.is_empty() || *expected == got);
                *expected = got;
                Ok(())
            };
            backend.linear(&last, &refs, Epilogue::Store, false, &mut one);
            last_is(&got, &one, 0)?;
            let mut sum = backend.buffer_of(&before)?;
            linear(a, &[&linears[1]], Epilogue::Add, bulk, &mut sum);
            backend.read(&sum, &mut got)?;
            let want: Vec<f64> = before
                .iter()
                .zip(&wants[1])
                .map(|(&b, &w)| f64::from(b) + w)
                .collect();
            let mut one = backend.buffer_of(&before[(rows - 1) * outputs[1]..])?;
            backend.linear(&last, &[&linears[1]], Epilogue::Add, false, &mut one);
            last_is(&got, &one, 1)?;
            let slot = if bulk { 4 } else { 2 };
            worst[slot] = worst[slot].max(relative_error(&got, &want));
            linear(a, &[&linears[0], &twin], Epilogue::SwiGlu, bulk, &mut out);
            backend.read(&out, &mut got)?;
            let gated = [&linears[0], &twin];
            backend.linear(&last, &gated, Epilogue::SwiGlu, false, &mut one);
            last_is(&got, &one, 2)?;
            let bias = matrices[0].bias.as_deref().unwrap_or(&[]);
            let want: Vec<f64> = wants[0]
                .iter()
                .enumerate()
                .map(|(i, &gate)| {
                    let up = gate - f64::from(bias[i % outputs[0]]);
                    gate / (1.0 + (-gate).exp()) * up
                })
                .collect();
            let slot = if bulk { 4 } else { 3 };
            worst[slot] = worst[slot].max(relative_error(&got, &want));
        }
    }
    backend.force_product_kernel(None);
    let fine = alone && worst.iter().all(|&e| e < 1e-2);
    let cells: Vec<String> = worst.iter().map(|e| format!("{e:.1e}")).collect();
    println!(
        "| | {inputs} | {outputs:?} | {} | {} |",
        cells.join(" | "),
        if alone { "same bits" } else { "DIFFER" }
    );
    Ok(fine)
}
