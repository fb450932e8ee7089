//! A model split over several GPUs against the same model on one of them: tokens, times, and what the sums cost.

use std::path::Path;
use std::sync::{Arc, Barrier};

use anyhow::{Context, Result};
use specattn_engine::backend::Backend;
use specattn_engine::cuda::{CudaBackend, Device, RankGroup, SumWay};
use specattn_engine::{
    DType, DeviceChoice, EngineError, HeadLists, LoadOptions, LogitRows, Model, Sequence,
};

use super::forwards::{self, Asked, ForwardCase, Kind};
use super::numbers::Numbers;
use super::pair::{Reference, decode, lead};
use super::timer::launched_us;

/// Share of each GPU's memory that a model and its cache may take.
const MEMORY: f32 = 0.85;
/// Sums between two looks at the clock.
const SUMS: usize = 64;

/// Prints everything; true when no token differs but at a near tie.
///
/// # Errors
/// When a model cannot be loaded or a device fails.
pub fn report(root: &Path, split: &DeviceChoice) -> Result<bool> {
    let fine = tokens(root, split)? & sums(split)?;
    forwards(&root.join("bench/gpu/configs/llama-3-8b.json"), split)?;
    Ok(fine)
}

/// Greedy tokens of the bundled target.
fn tokens(root: &Path, split: &DeviceChoice) -> Result<bool> {
    let reference = Reference::read(&root.join("tests/fixtures/greedy_bundled.json"))?;
    let load = |device: DeviceChoice| {
        let options = LoadOptions {
            device,
            kv_cache_bytes: 512 << 20,
            ..LoadOptions::default()
        };
        Model::load(&root.join("models/target"), &options, &mut |_, _| {})
    };
    let mut several = match load(split.clone()) {
        Err(EngineError::InvalidArgument { reason, .. }) => {
            println!("Tokens of the bundled target were not compared: {reason}\n");
            return Ok(true);
        }
        loaded => loaded?,
    };
    let mut one = load(split.first())?;
    let (mut equal, mut drafted_equal, mut worst_gap) = (0, 0, 0.0f32);
    for entry in &reference.prompts {
        let count = entry.greedy.len();
        let on_one = decode(&mut one, &entry.prompt, count, None)?;
        let plain = decode(&mut several, &entry.prompt, count, None)?;
        let drafted = decode(&mut several, &entry.prompt, count, Some(&plain))?;
        drafted_equal += usize::from(plain == drafted);
        match plain.iter().zip(&on_one).position(|(a, b)| a != b) {
            None => equal += 1,
            Some(at) => {
                let lead = lead(&mut one, &entry.prompt, &on_one[..at])?;
                worst_gap = worst_gap.max(lead);
                println!(
                    "- prompt of {} tokens: first difference at token {at} of {count}, logit gap {lead}",
                    entry.prompt.len(),
                );
            }
        }
    }
    let prompts = reference.prompts.len();
    println!(
        "\ngreedy, dense, {split} against {}: {equal} of {prompts} prompts equal to the end; largest logit gap at a first difference {worst_gap}; with drafts {drafted_equal} of {prompts} equal without\n",
        split.first()
    );
    Ok(drafted_equal == prompts && worst_gap < 0.1)
}

/// Sums against the same sums on the host, and the time of one, back to back with others on the ranks' streams.
fn sums(split: &DeviceChoice) -> Result<bool> {
    let DeviceChoice::Cuda(numbers) = split else {
        return Ok(true);
    };
    let open = |&number| Device::shared(number, None);
    let devices: Vec<Arc<Device>> = numbers.iter().map(open).collect::<Result<_, _>>()?;
    let mut fine = true;
    for way in [SumWay::Peers, SumWay::Gathered] {
        let equal = sums_as_on_host(&devices, way)?;
        println!(
            "sums, {way:?}: {}\n",
            match equal {
                Some(true) => "those of the host",
                Some(false) => "OTHER SUMS",
                None => "no such way between these GPUs",
            }
        );
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
    Ok(fine)
}

/// Runs `work` for every rank, a thread each; what the ranks yield, in order.
fn on_ranks<T: Send>(
    devices: &[Arc<Device>],
    work: impl Fn(usize, &RankGroup, &Arc<Device>) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let ends = RankGroup::join(devices)?;
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
    let equal = on_ranks(devices, |rank, end, device| {
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
    })?;
    let all = |all: bool, equal: Option<bool>| Some(all & equal?);
    Ok(equal.into_iter().try_fold(true, all))
}

/// The first rank's time for one sum of `elements`; `None` where they are not summed that way.
fn sum_us(devices: &[Arc<Device>], elements: usize, way: SumWay) -> Result<Option<f64>> {
    let start = Barrier::new(devices.len());
    let times = on_ranks(devices, |_, end, device| {
        if !end.can(way, elements) {
            return Ok(None);
        }
        let backend = CudaBackend::new(device.clone(), DType::Bf16)?;
        let mut x = backend.buffer_of(&vec![0.0; elements])?;
        let us = launched_us(device, |_| {
            start.wait();
            for _ in 0..SUMS {
                end.sum_by(way, &mut x);
            }
            Ok(())
        })?;
        backend.finish()?;
        Ok(Some(us / SUMS as f64))
    })?;
    times.first().copied().context("a rank")
}

/// Whole forwards of random weights.
fn forwards(config: &Path, split: &DeviceChoice) -> Result<()> {
    let cases: Vec<ForwardCase> = [(1, 4096), (1, 16_384), (1, 32_768), (8, 4096), (8, 32_768)]
        .into_iter()
        .flat_map(|(batch, context)| {
            [1, 5].map(|tokens| ForwardCase {
                batch,
                context,
                tokens,
            })
        })
        .collect();
    let one = times(config, &split.first(), &cases)?;
    let several = times(config, split, &cases)?;
    println!("llama-3-8b, random weights, most probable tokens handed out.\n");
    println!(
        "| batch | context | tokens | attention | {} ms | {split} ms | ÷ |",
        split.first()
    );
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for (case, (one, several)) in cases.iter().zip(one.iter().zip(&several)) {
        for (kind, (one, several)) in ["dense", "sparse"].iter().zip(one.iter().zip(several)) {
            println!(
                "| {} | {} | {} | {kind} | {one:.2} | {several:.2} | {:.2} |",
                case.batch,
                case.context,
                case.tokens,
                several / one
            );
        }
    }
    println!();
    Ok(())
}

/// Milliseconds of each case, dense and sparse.
fn times(config: &Path, device: &DeviceChoice, cases: &[ForwardCase]) -> Result<Vec<[f64; 2]>> {
    let options = LoadOptions {
        device: device.clone(),
        gpu_memory_utilization: Some(MEMORY),
        ..LoadOptions::default()
    };
    let mut model = Model::random(config, &options)?;
    let heads = model.config().num_layers * model.config().num_kv_heads;
    let mut numbers = Numbers(31);
    let mut all = Vec::new();
    for &case in cases {
        let room = case.context + case.tokens;
        let sequences: Result<Vec<Sequence>, _> =
            (0..case.batch).map(|_| model.new_sequence(room)).collect();
        let mut sequences = sequences?;
        for sequence in &mut sequences {
            forwards::prefill(&mut model, sequence, case.context)?;
        }
        let lists: Vec<HeadLists> = (0..case.batch)
            .map(|_| forwards::one_list(case.context, heads, &mut numbers))
            .collect();
        let mut both = [0.0; 2];
        for (ms, kind) in both.iter_mut().zip([Kind::Dense, Kind::Sparse]) {
            let asked = Asked {
                kind,
                logits: LogitRows::All,
                argmax: true,
            };
            *ms = forwards::time(&mut model, &mut sequences, case, asked, &lists)?;
        }
        all.push(both);
    }
    Ok(all)
}
