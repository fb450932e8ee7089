//! [`Cost`]: how long forwards take, by the bytes they read and the operations they do.
//!
//! A batch takes a time per layer, the time to read the weights once and each sequence's KV entries, and the time of its
//! tokens' products. The terms are added: on an H100 that is within 7 % of whole forwards as they were measured, where the
//! longest alone is not.

use std::str::FromStr;
use std::time::Duration;

use specattn_engine::{BLOCK_TOKENS, LogitRows, Step};

/// What a device does in a second, as far as forwards get it to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Device {
    /// Bytes read.
    pub bytes: f64,
    /// Operations on the few tokens of rounds and draft steps.
    pub operations: f64,
    /// Operations on prompts.
    pub prompt_operations: f64,
    /// Seconds that a layer takes at least.
    pub layer_seconds: f64,
    /// Bytes for weights and KV entries together.
    pub memory: f64,
}

impl Device {
    /// One H100 of 80 GB: its copy rate; rows and layers as fitted to `bench/gpu/results/2026-11-25-h100.md`; half of cuBLAS's
    /// rate for prompts, an assumption; nine tenths of its memory.
    pub const H100: Self = Self {
        bytes: 2.95e12,
        operations: 225e12,
        prompt_operations: 430e12,
        layer_seconds: 34e-6,
        memory: 72e9,
    };
}

/// What a model asks of a device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// Layers.
    pub layers: f64,
    /// Bytes of weights that a forward reads.
    pub weight_bytes: f64,
    /// Operations per token.
    pub operations: f64,
    /// Bytes of KV entries per position.
    pub kv_bytes: f64,
}

impl Shape {
    /// Llama-3-8B in bf16.
    pub const LLAMA_3_8B: Self = Self {
        layers: 32.0,
        weight_bytes: 15.01e9,
        operations: 15.01e9,
        kv_bytes: 131_072.0,
    };

    /// Llama-3.2-1B in bf16.
    pub const LLAMA_3_2_1B: Self = Self {
        layers: 16.0,
        weight_bytes: 2.47e9,
        operations: 2.47e9,
        kv_bytes: 32_768.0,
    };
}

/// A model on a device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// The device.
    pub device: Device,
    /// The model.
    pub shape: Shape,
}

/// One sequence's part in a batch.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// Tokens fed.
    pub tokens: usize,
    /// Positions whose entries are read.
    pub positions: usize,
    /// Whether they are a prompt's.
    pub is_prompt: bool,
}

impl From<&Step<'_>> for Part {
    fn from(step: &Step<'_>) -> Self {
        Self {
            tokens: step.tokens.len(),
            positions: step.sequence.len() + step.tokens.len(),
            is_prompt: matches!(step.logits, LogitRows::None | LogitRows::Replay),
        }
    }
}

impl Cost {
    /// The time of a batch.
    pub fn of(&self, parts: impl Iterator<Item = Part>) -> Duration {
        let Self { device, shape } = self;
        let fixed = shape.layers * device.layer_seconds + shape.weight_bytes / device.bytes;
        let seconds = parts.fold(fixed, |seconds, part| {
            let rate = if part.is_prompt {
                device.prompt_operations
            } else {
                device.operations
            };
            seconds
                + part.positions as f64 * shape.kv_bytes / device.bytes
                + part.tokens as f64 * shape.operations / rate
        });
        Duration::from_secs_f64(seconds)
    }

    /// KV blocks that the device has memory for.
    pub fn kv_blocks(&self) -> usize {
        let free = self.device.memory - self.shape.weight_bytes;
        // The conversion saturates: nothing is free where the weights do not fit.
        (free / (self.shape.kv_bytes * BLOCK_TOKENS as f64)) as usize
    }
}

fn numbers<const N: usize>(text: &str, what: &str) -> Result<[f64; N], String> {
    let parsed: Result<Vec<f64>, _> = text.split(',').map(str::parse::<f64>).collect();
    parsed
        .ok()
        .filter(|all| all.iter().all(|x| x.is_finite() && *x >= 0.0))
        .and_then(|all| all.try_into().ok())
        .ok_or_else(|| format!("{text} is not {what}"))
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "h100" {
            return Ok(Self::H100);
        }
        let what = "h100, or GB/s,TFLOP/s,TFLOP/s of prompts,µs per layer,GB of memory";
        let [bytes, operations, prompts, layer, memory] = numbers(text, what)?;
        if bytes * operations * prompts == 0.0 {
            return Err(format!("{text} has a rate of zero"));
        }
        Ok(Self {
            bytes: bytes * 1e9,
            operations: operations * 1e12,
            prompt_operations: prompts * 1e12,
            layer_seconds: layer * 1e-6,
            memory: memory * 1e9,
        })
    }
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "llama-3-8b" => return Ok(Self::LLAMA_3_8B),
            "llama-3.2-1b" => return Ok(Self::LLAMA_3_2_1B),
            _ => {}
        }
        let what = "llama-3-8b, llama-3.2-1b, or layers,GB of weights,GFLOP per token,KiB of KV entries per position";
        let [layers, weights, operations, kv] = numbers(text, what)?;
        if weights * operations * kv == 0.0 {
            return Err(format!("{text} is no model"));
        }
        Ok(Self {
            layers,
            weight_bytes: weights * 1e9,
            operations: operations * 1e9,
            kv_bytes: kv * 1_024.0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_take_what_was_measured_on_an_h100() {
        // bench/gpu/results/2026-11-25-h100.md, Llama-3-8B's layers without the head: batch, context, tokens each, ms.
        let layers = Shape {
            weight_bytes: 13.96e9,
            operations: 13.96e9,
            ..Shape::LLAMA_3_8B
        };
        let cost = Cost {
            device: Device::H100,
            shape: layers,
        };
        for (batch, positions, tokens, measured) in [
            (1, 4_096, 5, 6.66),
            (1, 16_384, 5, 7.02),
            (1, 32_768, 5, 8.02),
            (8, 4_096, 5, 9.67),
            (8, 16_384, 5, 14.61),
            (8, 32_768, 5, 21.13),
            (1, 8_192, 1, 6.07),
            (32, 8_192, 1, 18.86),
        ] {
            let part = Part {
                tokens,
                positions,
                is_prompt: false,
            };
            let ms = cost.of(std::iter::repeat_n(part, batch)).as_secs_f64() * 1e3;
            let off = ms / measured - 1.0;
            assert!(
                off.abs() < 0.07,
                "{batch} × {positions}: {ms:.2} of {measured}"
            );
        }
        // A draft step of TinyLlama's shape, 2026-11-26-h100.md.
        let tiny: Shape = "22,2.2,2.2,22".parse().unwrap();
        let part = Part {
            tokens: 1,
            positions: 4_096,
            is_prompt: false,
        };
        let ms = Cost {
            shape: tiny,
            ..cost
        }
        .of([part].into_iter())
        .as_secs_f64()
            * 1e3;
        assert!((ms / 1.42 - 1.0).abs() < 0.1, "{ms:.2}");
    }

    #[test]
    fn memory_is_what_the_weights_leave() {
        let cost = |shape| Cost {
            device: Device::H100,
            shape,
        };
        // 57 GB at 8 MiB a block.
        let blocks = cost(Shape::LLAMA_3_8B).kv_blocks();
        assert!((6_700..6_900).contains(&blocks), "{blocks}");
        let huge = Shape {
            weight_bytes: 1e12,
            ..Shape::LLAMA_3_8B
        };
        assert_eq!(cost(huge).kv_blocks(), 0);
    }

    #[test]
    fn descriptions_are_read() {
        let device: Device = "64,0.2,0.4,3,8".parse().unwrap();
        assert_eq!((device.bytes, device.operations), (64e9, 0.2e12));
        assert_eq!("h100".parse(), Ok(Device::H100));
        for text in [
            "",
            "h200",
            "1,2,3,4",
            "1,0,3,4,5",
            "1,2,3,nan,5",
            "-1,2,3,4,5",
        ] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
        assert!("8,0.029,0.029".parse::<Shape>().is_err());
        assert!("8,0.029,0.029,0".parse::<Shape>().is_err());
        assert_eq!("llama-3-8b".parse(), Ok(Shape::LLAMA_3_8B));
    }
}
