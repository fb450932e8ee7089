//! What the ranks of a split model add up: sums against those of the host, products that send themselves against product, sum and norm
//! one after another, and what each costs.

use std::sync::{Arc, Barrier};

use anyhow::{Context, Result};
use specattn_engine::backend::{Backend, Epilogue, Linear};
use specattn_engine::cuda::{Buffer, CudaBackend, Device, RankGroup, SumWay, Weight};
use specattn_engine::{DType, DeviceChoice};

use super::numbers::Numbers;
use super::timer::launched_us;

/// Sums between two looks at the clock.
const SUMS: usize = 64;

/// Prints everything; true when no comparison finds a difference.
///
/// # Errors
/// When a device fails.
pub(super) fn report(split: &DeviceChoice) -> Result<bool> {
    let DeviceChoice::Cuda(numbers) = split else {
        return Ok(true);
    };
    let open = |&number| Device::shared(number, None);
    let devices: Vec<Arc<Device>> = numbers.iter().map(open).collect::<Result<_, _>>()?;
    let mut fine = true;
    for way in [SumWay::Peers, SumWay::Gathered] {
        let equal = sums_as_on_host(&devices, way)?;
        println!("sums, {way:?}, and the host's: {}\n", said(equal));
        fine &= equal != Some(false);
    }
    println!("One sum over the ranks, f32, {SUMS} in a row.\n");
    println!("| rows × width | KiB | peers' memory µs | gathered and added µs | NCCL's sum µs |");
    println!("| --- | --- | --- | --- | --- |");
    for rows in [1, 5, 20, 40, 160, 256, 512, 2048] {
        let width = 4096;
        let mut cells = Vec::new();
        for way in [SumWay::Peers, SumWay::Gathered, SumWay::Nccl] {
            let us = sum_us(&devices, rows * width, way)?;
            cells.push(us.map_or(String::new(), |us| format!("{us:.1}")));
        }
        let kib = rows * width * 4 / 1024;
        println!("| {rows} × {width} | {kib} | {} |", cells.join(" | "));
    }
    println!();
    let equal = sent_as_in_turn(&devices)?;
    println!(
        "products that send themselves, their sums and norms, and one after another: {}\n",
        said(equal)
    );
    fine &= equal != Some(false);
    println!("Product, sum and norm, {SUMS} in a row.\n");
    println!("| rows | inputs × outputs | in turn µs | sent µs |");
    println!("| --- | --- | --- | --- |");
    for rows in [1, 5, 8, 40] {
        for shape in [(2048, 4096), (7168, 4096)] {
            let mut cells = Vec::new();
            for sent in [false, true] {
                let us = product_us(&devices, rows, shape, sent)?;
                cells.push(us.map_or(String::new(), |us| format!("{us:.1}")));
            }
            println!(
                "| {rows} | {} × {} | {} |",
                shape.0,
                shape.1,
                cells.join(" | ")
            );
        }
    }
    println!();
    Ok(fine)
}

/// What a comparison says.
fn said(equal: Option<bool>) -> &'static str {
    match equal {
        Some(true) => "the same",
        Some(false) => "DIFFERENT",
        None => "no such way between these GPUs",
    }
}

/// Runs `work` for every rank, a thread each; what the ranks yield, in order.
fn on_ranks<T: Send>(
    devices: &[Arc<Device>],
    work: impl Fn(usize, &RankGroup, &Arc<Device>) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let ends = RankGroup::join(devices, DType::Bf16)?;
    let work = &work;
    std::thread::scope(|scope| {
        let ranks = devices.iter().zip(ends).enumerate();
        let threads: Vec<_> = ranks
            .map(|(rank, (device, end))| scope.spawn(move || work(rank, &end, device)))
            .collect();
        let yielded = threads.into_iter().map(|t| t.join().expect("no panic"));
        yielded.collect()
    })
}

/// Whether every rank finds what it compares equal; `None` where one has nothing to compare.
fn equal_on_all(
    devices: &[Arc<Device>],
    compare: impl Fn(usize, &RankGroup, &Arc<Device>) -> Result<Option<bool>> + Sync,
) -> Result<Option<bool>> {
    let all = |all: bool, equal: Option<bool>| Some(all & equal?);
    Ok(on_ranks(devices, compare)?.into_iter().try_fold(true, all))
}

/// The first rank's time for one of [`SUMS`] in a row of what `prepare` makes and `once` does; `None` where it makes nothing.
fn in_a_row_us<W>(
    devices: &[Arc<Device>],
    prepare: impl Fn(usize, &RankGroup, &CudaBackend) -> Result<Option<W>> + Sync,
    once: impl Fn(&mut W, &RankGroup, &CudaBackend) + Sync,
) -> Result<Option<f64>> {
    let start = Barrier::new(devices.len());
    let times = on_ranks(devices, |rank, end, device| {
        let backend = CudaBackend::new(device.clone(), DType::Bf16)?;
        let Some(mut work) = prepare(rank, end, &backend)? else {
            return Ok(None);
        };
        let us = launched_us(device, |_| {
            start.wait();
            for _ in 0..SUMS {
                once(&mut work, end, &backend);
            }
            Ok(())
        })?;
        backend.finish()?;
        Ok(Some(us / SUMS as f64))
    })?;
    times.first().copied().context("a rank")
}

/// Whether sums have the bits of parts added rank by rank, in sums of changing sizes that follow each other; `None` where nothing is
/// summed that way.
fn sums_as_on_host(devices: &[Arc<Device>], way: SumWay) -> Result<Option<bool>> {
    let sizes = [
        4096,
        2,
        20 * 4096,
        6,
        160 * 4096,
        5 * 4096,
        256 * 4096,
        1000,
    ];
    let part = |rank: usize, size: usize| Numbers(97 + rank as u64).rounded(size, 1.0, DType::F32);
    equal_on_all(devices, |rank, end, device| {
        if sizes.iter().any(|&size| !end.can(way, size)) {
            return Ok(None);
        }
        let backend = CudaBackend::new(device.clone(), DType::Bf16)?;
        let mut equal = true;
        for _ in 0..3 {
            let mut buffers = Vec::new();
            for size in sizes {
                buffers.push(backend.buffer_of(&part(rank, size))?);
            }
            for x in &mut buffers {
                end.sum_by(way, x);
            }
            for (x, size) in buffers.iter().zip(sizes) {
                let mut want = part(0, size);
                for other in 1..devices.len() {
                    let add = |(a, b): (&mut f32, f32)| *a += b;
                    want.iter_mut().zip(part(other, size)).for_each(add);
                }
                let mut got = Vec::new();
                backend.read(x, &mut got)?;
                equal &= got == want;
            }
        }
        Ok(Some(equal))
    })
}

/// The first rank's time for one sum of `elements`; `None` where they are not summed that way.
fn sum_us(devices: &[Arc<Device>], elements: usize, way: SumWay) -> Result<Option<f64>> {
    let prepare = |_, end: &RankGroup, backend: &CudaBackend| {
        let buffer = || backend.buffer_of(&vec![0.0; elements]);
        Ok(end.can(way, elements).then(buffer).transpose()?)
    };
    in_a_row_us(devices, prepare, |x, end, _| end.sum_by(way, x))
}

/// One rank's part of a product that is summed over the ranks, and the norm of the sum.
struct SplitProduct {
    x: Buffer,
    projection: Linear<Weight>,
    epilogue: Epilogue,
    norm: Weight,
    /// What the product is added to, by the first rank.
    stream: Buffer,
    normed: Buffer,
}

impl SplitProduct {
    fn new(
        backend: &CudaBackend,
        rank: usize,
        rows: usize,
        (inputs, outputs): (usize, usize),
    ) -> Result<Self> {
        let mut numbers = Numbers(7 + rank as u64);
        let ones = backend.weight_of(&vec![1.0; inputs], 1)?;
        let wide = backend.buffer_of(&numbers.rounded(rows * inputs, 1.0, DType::F32))?;
        let mut x = backend.buffer();
        backend.rms_norm(&wide, &ones, 1e-5, &mut x);
        // All ranks have one stream and one norm.
        let mut numbers = Numbers(5);
        Ok(Self {
            x,
            projection: Linear {
                weight: backend.random_matrix((outputs, inputs), 0.02, 40 + rank as u32)?,
                bias: None,
            },
            epilogue: if rank == 0 {
                Epilogue::Add
            } else {
                Epilogue::Store
            },
            stream: backend.buffer_of(&numbers.rounded(rows * outputs, 1.0, DType::F32))?,
            norm: backend.weight_of(&numbers.rounded(outputs, 1.0, DType::F32), 1)?,
            normed: backend.buffer(),
        })
    }

    /// Product, sum and norm.
    fn run(&mut self, backend: &CudaBackend, end: &RankGroup, sent: bool) {
        let (stream, normed) = (&mut self.stream, &mut self.normed);
        if sent {
            let product = (&self.x, &self.projection, self.epilogue);
            end.send_and_norm(backend, product, stream, (&self.norm, 1e-5), normed);
        } else {
            backend.linear(&self.x, &[&self.projection], self.epilogue, false, stream);
            end.sum_by(SumWay::Peers, stream);
            backend.rms_norm(stream, &self.norm, 1e-5, normed);
        }
    }
}

/// Whether products that send themselves end in the bits of product, sum and norm in turn, in shapes that follow each other; `None`
/// where none can be sent.
fn sent_as_in_turn(devices: &[Arc<Device>]) -> Result<Option<bool>> {
    let shapes = [
        (1, (2048, 4096)),
        (5, (96, 328)),
        (1, (64, 8)),
        (7, (7168, 4096)),
        (6, (256, 5120)),
        (3, (128, 12_296)),
        (40, (2048, 4096)),
        (20, (72, 1000)),
        (120, (384, 4096)),
    ];
    equal_on_all(devices, |rank, end, device| {
        let backend = CudaBackend::new(device.clone(), DType::Bf16)?;
        let mut results = [Vec::new(), Vec::new()];
        for (sent, results) in [false, true].into_iter().zip(&mut results) {
            // What ranks find out for themselves must be the same on all of them.
            let possible = shapes.iter().filter(|(rows, s)| end.can_send(rows * s.1));
            for &(rows, shape) in possible {
                let mut product = SplitProduct::new(&backend, rank, rows, shape)?;
                for _ in 0..3 {
                    product.run(&backend, end, sent);
                }
                let (mut stream, mut normed) = (Vec::new(), Vec::new());
                backend.read(&product.stream, &mut stream)?;
                backend.read(&product.normed, &mut normed)?;
                results.extend([stream, normed]);
            }
        }
        let [in_turn, sent] = results;
        Ok((!sent.is_empty()).then(|| in_turn == sent))
    })
}

/// The first rank's time for one product, sum and norm; `None` where it cannot be sent.
fn product_us(
    devices: &[Arc<Device>],
    rows: usize,
    shape: (usize, usize),
    sent: bool,
) -> Result<Option<f64>> {
    let prepare = |rank, end: &RankGroup, backend: &CudaBackend| {
        let product = || SplitProduct::new(backend, rank, rows, shape);
        end.can_send(rows * shape.1).then(product).transpose()
    };
    in_a_row_us(devices, prepare, |product, end, backend| {
        product.run(backend, end, sent);
    })
}
