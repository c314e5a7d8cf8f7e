//! `--device`: where a job computes.

use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

use candle_core::Device;

use crate::error::{Error, Result, one_line};
use crate::kernels::cuda;

/// Padded tokens of a batch on the CPU: enough rows for fast products, little enough memory.
pub const CPU_BATCH_TOKENS: usize = 4096;
/// The same on a CUDA device, which is busy with wide products only.
pub const CUDA_BATCH_TOKENS: usize = 16 << 10;

/// The devices that were asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first CUDA device where one answers, else the CPU.
    #[default]
    Auto,
    /// This many replicas of the model on the CPU; more than one is for tests of what works with several devices.
    Cpu(usize),
    /// One replica of the model on each of these CUDA devices.
    Cuda(Vec<usize>),
}

/// The devices that a job computes on: at least one, all of one kind, and in order.
#[derive(Debug, Clone)]
pub struct Devices {
    devices: Vec<Device>,
    /// Why they are not what could be expected.
    pub notice: Option<String>,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let names: Vec<&str> = text.split(',').collect();
        if names.iter().all(|name| *name == "cpu") {
            return Ok(Self::Cpu(names.len()));
        }
        let mut numbers = Vec::new();
        for name in names {
            let number = match name.split_once(':') {
                Some(("cuda", number)) => number.parse().ok(),
                None if name == "cuda" => Some(0),
                _ => None,
            };
            let number = number.ok_or_else(|| format!("'{name}': expected auto, cpu, or cuda:0,cuda:1,…"))?;
            if numbers.contains(&number) {
                return Err(format!("cuda:{number} is named twice"));
            }
            numbers.push(number);
        }
        Ok(Self::Cuda(numbers))
    }
}

impl Display for DeviceChoice {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let names = match self {
            Self::Auto => vec!["auto".to_owned()],
            Self::Cpu(replicas) => vec!["cpu".to_owned(); *replicas],
            Self::Cuda(numbers) => numbers.iter().map(|number| format!("cuda:{number}")).collect(),
        };
        f.write_str(&names.join(","))
    }
}

impl DeviceChoice {
    /// Opens the devices.
    ///
    /// # Errors
    /// [`Error::Device`] when one does not answer, or this build has no use for it.
    pub fn open(&self) -> Result<Devices> {
        let (devices, notice) = match self {
            Self::Cpu(replicas) => (vec![Device::Cpu; *replicas], None),
            Self::Cuda(numbers) => (numbers.iter().map(|&number| open_cuda(number)).collect::<Result<_>>()?, None),
            Self::Auto if !cuda::IS_BUILT => (vec![Device::Cpu], None),
            Self::Auto => match open_cuda(0) {
                Ok(device) => (vec![device], None),
                Err(error) => (vec![Device::Cpu], Some(format!("computing on the CPU: {error}"))),
            },
        };
        Ok(Devices { devices, notice })
    }
}

fn open_cuda(number: usize) -> Result<Device> {
    let refused = |message| Error::Device { device: format!("cuda:{number}"), message };
    if !cuda::IS_BUILT {
        return Err(refused(
            "this build computes on the CPU only; use --device cpu, or a build of `cargo build --release --features cuda`"
                .to_owned(),
        ));
    }
    cuda::open(number).map_err(|error| refused(format!("it does not answer: {}", one_line(error))))
}

impl Devices {
    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = &Device> {
        self.devices.iter()
    }

    /// The first of them.
    pub fn first(&self) -> &Device {
        self.devices.first().unwrap_or(&Device::Cpu)
    }

    /// Whether they are CUDA devices.
    pub fn are_cuda(&self) -> bool {
        self.first().is_cuda()
    }

    /// What determines results: `cpu` or `cuda`.
    pub fn kind(&self) -> &'static str {
        if self.are_cuda() { "cuda" } else { "cpu" }
    }

    /// The devices in words.
    pub fn describe(&self) -> String {
        let name = match self.first() {
            Device::Cuda(_) => cuda::name(self.first()).unwrap_or_else(|_| "a CUDA device".to_owned()),
            _ => "the CPU".to_owned(),
        };
        match self.devices.len() {
            0 | 1 => name,
            count => format!("{count} × {name}"),
        }
    }

    /// Padded tokens of a batch where nothing is said.
    pub fn default_batch_tokens(&self) -> usize {
        if self.are_cuda() { CUDA_BATCH_TOKENS } else { CPU_BATCH_TOKENS }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_what_was_asked_for_or_an_error() {
        let parsed = |text: &str| text.parse::<DeviceChoice>();
        assert_eq!(parsed("auto"), Ok(DeviceChoice::Auto));
        assert_eq!(parsed("cpu"), Ok(DeviceChoice::Cpu(1)));
        assert_eq!(parsed("cpu,cpu"), Ok(DeviceChoice::Cpu(2)));
        assert_eq!(parsed("cuda"), Ok(DeviceChoice::Cuda(vec![0])));
        assert_eq!(parsed("cuda:1,cuda:0"), Ok(DeviceChoice::Cuda(vec![1, 0])));
        for wrong in ["", "gpu", "cuda:x", "cuda:0,cpu", "cpu,cuda:0", "cuda:0,cuda:0", "cuda:-1", "auto,cpu"] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
        for text in ["auto", "cpu", "cpu,cpu", "cuda:1,cuda:0"] {
            assert_eq!(parsed(text).unwrap().to_string(), text);
        }
    }
}
