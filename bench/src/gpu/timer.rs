//! Times device work with events: alone, and as it runs inside a captured graph.

use anyhow::{Context, Result};
use cudarc::driver::sys;
use specattn_engine::cuda::Device;

/// Timed runs per figure, after warming up.
const RUNS: usize = 30;
const WARM_UP: usize = 5;
/// Launches per graph: enough that its start does not count.
const PER_GRAPH: usize = 20;

fn median(mut times: Vec<f32>) -> f64 {
    times.sort_by(f32::total_cmp);
    f64::from(times[times.len() / 2])
}

fn elapsed_us(device: &Device, work: impl FnOnce() -> Result<()>) -> Result<f32> {
    let stream = device.stream();
    let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
    let start = stream.record_event(flags)?;
    work()?;
    let end = stream.record_event(flags)?;
    Ok(start.elapsed_ms(&end)? * 1e3)
}

/// The median time of one `work(i)` launched from the host, in µs; `i` counts on, so that inputs can rotate.
///
/// # Errors
/// When the device fails.
pub fn launched_us(device: &Device, mut work: impl FnMut(usize) -> Result<()>) -> Result<f64> {
    let mut times = Vec::new();
    for i in 0..WARM_UP + RUNS {
        let time = elapsed_us(device, || work(i))?;
        if i >= WARM_UP {
            times.push(time);
        }
    }
    Ok(median(times))
}

/// The median time of one `work(i)` inside a graph of many, in µs.
///
/// # Errors
/// When the device fails, or the work cannot be captured.
pub fn in_graph_us(device: &Device, mut work: impl FnMut(usize) -> Result<()>) -> Result<f64> {
    let stream = device.stream();
    work(0)?;
    stream.synchronize()?;
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)?;
    let captured = (0..PER_GRAPH).try_for_each(&mut work);
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0))?;
    captured?;
    let graph = graph.context("the work was captured")?;
    let mut times = Vec::new();
    for i in 0..3 + RUNS {
        let time = elapsed_us(device, || Ok(graph.launch()?))?;
        if i >= 3 {
            times.push(time / PER_GRAPH as f32);
        }
    }
    Ok(median(times))
}

/// Bytes per second of a device-to-device copy, read and written bytes counted.
///
/// # Errors
/// When the device fails.
pub fn copy_bandwidth(device: &Device) -> Result<f64> {
    const BYTES: usize = 1 << 30;
    let stream = device.stream();
    let from = stream.alloc_zeros::<u8>(BYTES)?;
    let mut to = stream.alloc_zeros::<u8>(BYTES)?;
    let us = launched_us(device, |_| Ok(stream.memcpy_dtod(&from, &mut to)?))?;
    Ok(2.0 * BYTES as f64 / (us * 1e-6))
}
