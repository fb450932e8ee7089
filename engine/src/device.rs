//! [`DeviceChoice`]: where a model runs.

use std::fmt;
use std::str::FromStr;

use crate::error::EngineError;

/// More GPUs than a host has.
const MAX_GPUS: usize = 1024;

/// What `--device` takes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The first GPU where there is one that the build can use, else the CPU.
    Auto,
    /// The CPU.
    #[default]
    Cpu,
    /// The GPUs of these numbers, a rank of the model on each; a single one is the first of as many as the model has ranks.
    Cuda(Vec<usize>),
}

impl DeviceChoice {
    /// The GPU of this number.
    pub fn gpu(number: usize) -> Self {
        Self::Cuda(vec![number])
    }

    /// The first of several GPUs; any other choice as it is.
    #[must_use]
    pub fn first(&self) -> Self {
        match self {
            Self::Cuda(numbers) => Self::Cuda(numbers[..1].to_vec()),
            other => other.clone(),
        }
    }

    /// The choice with [`DeviceChoice::Auto`] decided.
    #[must_use]
    pub fn decided(&self) -> Self {
        match self {
            #[cfg(feature = "cuda")]
            Self::Auto if crate::cuda::device_count() > 0 => Self::gpu(0),
            Self::Auto => Self::Cpu,
            other => other.clone(),
        }
    }

    /// The choice for a model of `ranks` ranks, `None` leaving their number to the choice: decided, and with every rank's GPU named.
    ///
    /// # Errors
    /// [`EngineError::InvalidArgument`] when as many GPUs as ranks are not what is named.
    pub(crate) fn for_ranks(&self, ranks: Option<usize>) -> Result<Self, EngineError> {
        let choice = self.decided();
        let Self::Cuda(numbers) = &choice else {
            return Ok(choice);
        };
        if ranks.is_some_and(|ranks| ranks > MAX_GPUS) {
            return Err(EngineError::InvalidArgument {
                what: "tensor parallelism",
                reason: format!("more than {MAX_GPUS} ranks"),
            });
        }
        match (numbers.as_slice(), ranks) {
            (&[first], Some(ranks)) => Ok(Self::Cuda((first..first + ranks).collect())),
            (several, Some(ranks)) if several.len() != ranks => Err(EngineError::InvalidArgument {
                what: "device",
                reason: format!("{choice} names {} GPUs for {ranks} ranks", several.len()),
            }),
            _ => Ok(choice),
        }
    }
}

/// A device that runs a model or a rank of one, as people know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `cpu`, or `cuda:N` as this process numbers GPUs.
    pub id: String,
    /// What its maker calls it; empty for a CPU.
    pub name: String,
    /// Its own memory; 0 for a CPU.
    pub memory_bytes: u64,
    /// The slowest way from here to the model's other devices; `None` where there are none.
    pub link: Option<DeviceLink>,
}

/// How two devices exchange data, fastest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DeviceLink {
    /// Through memory that both have: ranks on one CPU.
    SharedMemory,
    /// NVLink.
    NvLink,
    /// Directly over PCIe.
    Pcie,
    /// Through the host's memory.
    Host,
}

impl fmt::Display for DeviceLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SharedMemory => "shared memory",
            Self::NvLink => "NVLink",
            Self::Pcie => "PCIe",
            Self::Host => "host memory",
        })
    }
}

/// The CPU, as each of `ranks` ranks sees it.
pub(crate) fn cpu_devices(ranks: usize) -> Vec<DeviceInfo> {
    let cpu = DeviceInfo {
        id: "cpu".to_owned(),
        name: String::new(),
        memory_bytes: 0,
        link: (ranks > 1).then_some(DeviceLink::SharedMemory),
    };
    vec![cpu; ranks]
}

impl FromStr for DeviceChoice {
    type Err = EngineError;

    fn from_str(text: &str) -> Result<Self, EngineError> {
        let invalid = |reason| EngineError::InvalidArgument {
            what: "device",
            reason,
        };
        let numbers = |text: &str| {
            let numbers: Vec<usize> = text
                .split(',')
                .map(|n| n.parse().ok())
                .collect::<Option<_>>()?;
            let in_range = numbers.len() <= MAX_GPUS && numbers.iter().all(|&n| n < MAX_GPUS);
            in_range.then_some(numbers)
        };
        let choice = match text {
            "auto" => Some(Self::Auto),
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::gpu(0)),
            _ => text.strip_prefix("cuda:").and_then(numbers).map(Self::Cuda),
        };
        let choice = choice.ok_or_else(|| {
            invalid(format!(
                "{text:?} is none of auto, cpu, cuda:N, cuda:N,M,..."
            ))
        })?;
        if let Self::Cuda(numbers) = &choice
            && numbers
                .iter()
                .enumerate()
                .any(|(i, n)| numbers[..i].contains(n))
        {
            return Err(invalid(format!("{text:?} names a GPU twice")));
        }
        Ok(choice)
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(numbers) => {
                let numbers: Vec<String> = numbers.iter().map(usize::to_string).collect();
                write!(f, "cuda:{}", numbers.join(","))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for name in ["auto", "cpu", "cuda:0", "cuda:12", "cuda:0,1", "cuda:3,1,2"] {
            assert_eq!(name.parse::<DeviceChoice>().unwrap().to_string(), name);
        }
        for bad in [
            "",
            "gpu",
            "cuda:",
            "cuda:-1",
            "cuda:x",
            "cuda:0,",
            "cuda:99999",
            "CUDA:0",
        ] {
            let error = bad.parse::<DeviceChoice>().unwrap_err();
            assert!(error.to_string().contains("cuda:N"), "{error}");
        }
        let twice = "cuda:1,1".parse::<DeviceChoice>().unwrap_err();
        assert!(twice.to_string().contains("twice"), "{twice}");
        assert_ne!(DeviceChoice::Auto.decided(), DeviceChoice::Auto);
    }

    #[test]
    fn ranks_get_consecutive_gpus_or_those_listed() {
        let gpus = |choice: &str, ranks| {
            let choice: DeviceChoice = choice.parse().unwrap();
            choice.for_ranks(ranks).map(|choice| choice.to_string())
        };
        assert_eq!(gpus("cuda:2", Some(3)).unwrap(), "cuda:2,3,4");
        assert_eq!(gpus("cuda:2", None).unwrap(), "cuda:2");
        assert_eq!(gpus("cuda:2,0", None).unwrap(), "cuda:2,0");
        assert_eq!(gpus("cuda:2,0", Some(2)).unwrap(), "cuda:2,0");
        assert_eq!(gpus("cpu", Some(2)).unwrap(), "cpu");
        assert!(gpus("cuda:2,0", Some(3)).is_err());
    }
}
