//! [`DeviceChoice`]: where a model runs.

use std::fmt;
use std::str::FromStr;

use crate::error::EngineError;

/// What `--device` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The first GPU where there is one that the build can use, else the CPU.
    Auto,
    /// The CPU.
    #[default]
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

impl DeviceChoice {
    /// The choice with [`DeviceChoice::Auto`] decided.
    #[must_use]
    pub fn decided(self) -> Self {
        match self {
            #[cfg(feature = "cuda")]
            Self::Auto if crate::cuda::device_count() > 0 => Self::Cuda(0),
            Self::Auto => Self::Cpu,
            other => other,
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = EngineError;

    fn from_str(text: &str) -> Result<Self, EngineError> {
        let number = |text: &str| text.parse().ok().map(Self::Cuda);
        let choice = match text {
            "auto" => Some(Self::Auto),
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::Cuda(0)),
            _ => text.strip_prefix("cuda:").and_then(number),
        };
        choice.ok_or_else(|| EngineError::InvalidArgument {
            what: "device",
            reason: format!("{text:?} is none of auto, cpu, cuda:N"),
        })
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for name in ["auto", "cpu", "cuda:0", "cuda:12"] {
            assert_eq!(name.parse::<DeviceChoice>().unwrap().to_string(), name);
        }
        for bad in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA:0"] {
            let error = bad.parse::<DeviceChoice>().unwrap_err();
            assert!(error.to_string().contains("cuda:N"), "{error}");
        }
        assert_ne!(DeviceChoice::Auto.decided(), DeviceChoice::Auto);
    }
}
