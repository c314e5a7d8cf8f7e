//! Safetensors files, mapped from disk and checked tensor by tensor.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use memmap2::{Mmap, UncheckedAdvice};
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors, tensor::Metadata};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
/// Elements converted by one rayon task: large enough to be worth a task, small enough to share.
const CONVERT_CHUNK: usize = 1 << 16;
/// Bytes of each tensor that enter the checkpoint's identity.
const SAMPLE_BYTES: usize = 4096;

/// The tensors of a checkpoint, mapped from its safetensors files.
///
/// Memory is used only for what is converted: the mapping itself is paged in and out by the system. The files must not
/// be shortened while they are mapped, as for every program that maps files.
#[derive(Debug)]
pub struct Weights {
    files: Vec<MappedFile>,
    /// The file that holds each tensor.
    by_name: HashMap<String, usize>,
    dir: PathBuf,
}

#[derive(Debug)]
struct MappedFile {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    /// Where the tensors' bytes begin.
    data_start: usize,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Weights {
    /// Maps `model.safetensors`, or the files that `model.safetensors.index.json` lists.
    ///
    /// # Errors
    /// [`Error::Config`] naming the file when there are no safetensors files, one is missing, has a broken header, or the
    /// index points outside the folder.
    pub fn open(dir: &Path) -> Result<Self> {
        let index_path = dir.join(INDEX_FILE);
        let mut names: Vec<String> = if dir.join(SINGLE_FILE).is_file() {
            vec![SINGLE_FILE.to_owned()]
        } else if index_path.is_file() {
            let text = std::fs::read_to_string(&index_path).map_err(|error| Error::config(&index_path, error))?;
            let index: Index = serde_json::from_str(&text).map_err(|error| Error::config(&index_path, error))?;
            index.weight_map.into_values().collect()
        } else {
            return Err(Error::config(dir, no_weights_message(dir)));
        };
        names.sort_unstable();
        names.dedup();
        if let Some(name) = names.iter().find(|name| Path::new(name).file_name() != Some(name.as_ref())) {
            return Err(Error::config(&index_path, format!("lists '{name}', which is not a file name in this folder")));
        }

        let files = names.iter().map(|name| MappedFile::open(dir.join(name))).collect::<Result<Vec<_>>>()?;
        let mut by_name = HashMap::new();
        for (index, file) in files.iter().enumerate() {
            for name in file.metadata.tensors().into_keys() {
                if by_name.insert(name.clone(), index).is_some() {
                    return Err(Error::config(&file.path, format!("tensor '{name}' is in two files")));
                }
            }
        }
        Ok(Self { files, by_name, dir: dir.to_owned() })
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// The names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// The mapped files and their sizes in bytes.
    pub fn files(&self) -> impl Iterator<Item = (&Path, u64)> {
        self.files.iter().map(|file| (file.path.as_path(), file.map.len() as u64))
    }

    /// Total number of stored parameters.
    pub fn num_parameters(&self) -> u64 {
        self.infos().map(|info| info.shape.iter().product::<usize>() as u64).sum()
    }

    /// The dtypes that tensors are stored in, most parameters first.
    pub fn dtypes(&self) -> Vec<(String, u64)> {
        let mut counts: HashMap<String, u64> = HashMap::new();
        for info in self.infos() {
            *counts.entry(format!("{:?}", info.dtype)).or_default() += info.shape.iter().product::<usize>() as u64;
        }
        let mut counts: Vec<_> = counts.into_iter().collect();
        counts.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        counts
    }

    fn infos(&self) -> impl Iterator<Item = &safetensors::tensor::TensorInfo> {
        self.files.iter().flat_map(|file| file.metadata.tensors().into_values())
    }

    /// Reads one tensor as f32, whatever it is stored in.
    ///
    /// # Errors
    /// [`Error::Config`] naming the tensor when it is missing, has another shape or dtype than expected, or holds
    /// NaN or infinity.
    pub fn tensor(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
        self.tensor_as(name, shape, DType::F32, device)
    }

    /// Reads one tensor as `dtype`, whatever it is stored in.
    ///
    /// # Errors
    /// As [`Weights::tensor`], and when a value is beyond what the dtype holds.
    pub fn tensor_as(&self, name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let mut values = vec![0f32; shape.iter().product()];
        self.read_into(name, shape, &mut values)?;
        self.place(name, values, shape, dtype, device)
    }

    /// Reads matrices `[rows, columns]` of equal width as one of `dtype`, stacked by rows.
    ///
    /// One product with the stacked matrix does the work of several.
    ///
    /// # Errors
    /// As [`Weights::tensor_as`].
    pub fn stacked(&self, parts: &[(String, usize)], columns: usize, dtype: DType, device: &Device) -> Result<Tensor> {
        let rows = parts.iter().map(|(_, rows)| rows).sum::<usize>();
        let mut values = vec![0f32; rows * columns];
        let mut rest = &mut values[..];
        for (name, rows) in parts {
            let (part, later) = rest.split_at_mut(rows * columns);
            self.read_into(name, &[*rows, columns], part)?;
            rest = later;
        }
        let name = parts.first().map_or("", |(name, _)| name.as_str());
        self.place(name, values, &[rows, columns], dtype, device)
    }

    /// Converts on the host, so that no device needs memory for both.
    fn place(&self, name: &str, values: Vec<f32>, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        match dtype {
            DType::BF16 => {
                let values: Vec<bf16> = values.into_par_iter().map(bf16::from_f32).collect();
                Ok(Tensor::from_vec(values, shape, device)?)
            }
            DType::F16 => {
                let values: Vec<f16> = values.into_par_iter().map(f16::from_f32).collect();
                if values.par_iter().any(|value| !value.is_finite()) {
                    let message = format!("tensor '{name}' holds values beyond f16; compute with --dtype bf16 or f32");
                    return Err(Error::config(&self.dir, message));
                }
                Ok(Tensor::from_vec(values, shape, device)?)
            }
            _ => Ok(Tensor::from_vec(values, shape, device)?),
        }
    }

    fn read_into(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<()> {
        let Some(file) = self.by_name.get(name).map(|&index| &self.files[index]) else {
            return Err(Error::config(&self.dir, format!("the checkpoint has no tensor '{name}'")));
        };
        let Some(info) = file.metadata.info(name) else {
            return Err(Error::config(&file.path, format!("the checkpoint has no tensor '{name}'")));
        };
        if info.shape != shape {
            let message = format!("tensor '{name}' has shape {:?}, but config.json makes it {shape:?}", info.shape);
            return Err(Error::config(&file.path, message));
        }
        let bytes = file.bytes(info);
        let finite = match info.dtype {
            Dtype::F32 => convert(bytes, out, f32::from_le_bytes),
            Dtype::F16 => convert(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => convert(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
            other => {
                let message = format!("tensor '{name}' is stored as {other:?}; F32, F16 and BF16 can be read");
                return Err(Error::config(&file.path, message));
            }
        };
        file.forget(info);
        if !finite {
            let message =
                format!("tensor '{name}' holds NaN or infinity; the checkpoint is damaged or diverged in training");
            return Err(Error::config(&file.path, message));
        }
        Ok(())
    }

    /// SHA-256 over names, dtypes, shapes, sizes and the first bytes of every tensor.
    ///
    /// A sample, because reading all of a large checkpoint to name it would take as long as loading it; retrained weights
    /// of the same shape differ in their first bytes.
    pub fn identity_sha256(&self) -> String {
        let mut names: Vec<&String> = self.by_name.keys().collect();
        names.sort_unstable();
        let mut hash = Sha256::new();
        for name in names {
            let file = &self.files[self.by_name[name]];
            if let Some(info) = file.metadata.info(name) {
                let bytes = file.bytes(info);
                hash.update(format!("{name} {:?} {:?} {}\n", info.dtype, info.shape, bytes.len()));
                hash.update(&bytes[..bytes.len().min(SAMPLE_BYTES)]);
            }
        }
        format!("{:x}", hash.finalize())
    }
}

impl MappedFile {
    fn open(path: PathBuf) -> Result<Self> {
        let file = File::open(&path).map_err(|error| Error::config(&path, format!("cannot open it: {error}")))?;
        // SAFETY: the mapping is read-only and private to this value; see the note on `Weights` about shortened files.
        let map =
            unsafe { Mmap::map(&file) }.map_err(|error| Error::config(&path, format!("cannot map it: {error}")))?;
        // The header is bounded, and every tensor's offsets are checked against the file's length.
        let (header_bytes, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|error| Error::config(&path, format!("not a whole safetensors file: {error}")))?;
        Ok(Self { path, map, metadata, data_start: 8 + header_bytes })
    }

    /// Gives back the memory of a tensor that was converted; another read would bring it in again.
    fn forget(&self, info: &safetensors::tensor::TensorInfo) {
        let (start, end) = info.data_offsets;
        // SAFETY: the mapping is of a file and never written to, so pages that are dropped come back as they were.
        let given_back =
            unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, self.data_start + start, end - start) };
        if let Err(error) = given_back {
            tracing::debug!("{}: its pages stay in memory: {error}", self.path.display());
        }
    }

    fn bytes(&self, info: &safetensors::tensor::TensorInfo) -> &[u8] {
        let (start, end) = info.data_offsets;
        &self.map[self.data_start + start..self.data_start + end]
    }
}

/// Converts little-endian elements to f32 on all cores; tells whether all are finite.
fn convert<const SIZE: usize>(bytes: &[u8], out: &mut [f32], element: impl Fn([u8; SIZE]) -> f32 + Sync) -> bool {
    out.par_chunks_mut(CONVERT_CHUNK)
        .zip(bytes.par_chunks(CONVERT_CHUNK * SIZE))
        .map(|(out, bytes)| {
            let mut finite = true;
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *value = element(*bytes);
                finite &= value.is_finite();
            }
            finite
        })
        .reduce(|| true, |a, b| a && b)
}

fn no_weights_message(dir: &Path) -> String {
    let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"];
    match pickled.iter().find(|name| dir.join(name).is_file()) {
        Some(name) => format!(
            "holds {name}, a pickle file, which can run code and is not read; convert it to {SINGLE_FILE} with transformers' save_pretrained"
        ),
        None => format!("holds no {SINGLE_FILE} and no {INDEX_FILE}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::TensorView;

    fn write(dir: &Path, file: &str, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) {
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            (name.to_string(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        safetensors::serialize_to_file(views, None, &dir.join(file)).unwrap();
    }

    fn f32_bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
        let error = result.unwrap_err();
        assert_eq!(error.exit_code(), crate::ExitCode::Config);
        error.to_string()
    }

    #[test]
    fn every_stored_dtype_becomes_f32() {
        let dir = tempfile::tempdir().unwrap();
        let halves: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        let brains: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        let tensors = [
            ("a", Dtype::F32, vec![1, 2], f32_bytes(&[1.5, -2.0])),
            ("b", Dtype::F16, vec![1, 2], halves),
            ("c", Dtype::BF16, vec![1, 2], brains),
        ];
        write(dir.path(), SINGLE_FILE, &tensors);
        let weights = Weights::open(dir.path()).unwrap();
        for name in ["a", "b", "c"] {
            let tensor = weights.tensor(name, &[1, 2], &Device::Cpu).unwrap();
            assert_eq!(tensor.to_vec2::<f32>().unwrap(), [[1.5, -2.0]]);
        }
        let stacked = weights.stacked(&[("a".into(), 1), ("c".into(), 1)], 2, DType::F32, &Device::Cpu).unwrap();
        assert_eq!(stacked.to_vec2::<f32>().unwrap(), [[1.5, -2.0], [1.5, -2.0]]);
        assert_eq!(weights.num_parameters(), 6);
    }

    #[test]
    fn a_missing_misshapen_or_nan_tensor_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let tensors = [
            ("good", Dtype::F32, vec![2], f32_bytes(&[0.0, 1.0])),
            ("nan", Dtype::F32, vec![2], f32_bytes(&[0.0, f32::NAN])),
            ("int", Dtype::I64, vec![1], vec![0; 8]),
        ];
        write(dir.path(), SINGLE_FILE, &tensors);
        let weights = Weights::open(dir.path()).unwrap();
        assert!(message(weights.tensor("absent", &[2], &Device::Cpu)).contains("no tensor 'absent'"));
        assert!(message(weights.tensor("good", &[1, 2], &Device::Cpu)).contains("shape [2]"));
        assert!(message(weights.tensor("nan", &[2], &Device::Cpu)).contains("'nan' holds NaN"));
        assert!(message(weights.tensor("int", &[1], &Device::Cpu)).contains("I64"));
    }

    #[test]
    fn shards_come_from_the_index_and_stay_in_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "one.safetensors", &[("a", Dtype::F32, vec![1], f32_bytes(&[1.0]))]);
        write(dir.path(), "two.safetensors", &[("b", Dtype::F32, vec![1], f32_bytes(&[2.0]))]);
        let index = |two: &str| {
            let text = format!(r#"{{"weight_map": {{"a": "one.safetensors", "b": "{two}"}}}}"#);
            std::fs::write(dir.path().join(INDEX_FILE), text).unwrap();
            Weights::open(dir.path())
        };
        let weights = index("two.safetensors").unwrap();
        assert_eq!(weights.tensor("b", &[1], &Device::Cpu).unwrap().to_vec1::<f32>().unwrap(), [2.0]);
        assert!(message(index("../two.safetensors")).contains("not a file name"));
        assert!(message(index("three.safetensors")).contains("three.safetensors"));
    }

    #[test]
    fn damaged_files_and_pickles_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(message(Weights::open(dir.path())).contains("holds no model.safetensors"));
        std::fs::write(dir.path().join("pytorch_model.bin"), b"x").unwrap();
        assert!(message(Weights::open(dir.path())).contains("pickle"));
        write(dir.path(), SINGLE_FILE, &[("a", Dtype::F32, vec![64], vec![0; 256])]);
        let path = dir.path().join(SINGLE_FILE);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert!(message(Weights::open(dir.path())).contains("not a whole safetensors file"));
        std::fs::write(&path, [0xff; 64]).unwrap();
        assert!(message(Weights::open(dir.path())).contains("not a whole safetensors file"));
        std::fs::write(&path, b"").unwrap();
        assert!(message(Weights::open(dir.path())).contains("safetensors"));
    }

    #[test]
    fn the_identity_follows_the_content() {
        let identity = |values: &[f32]| {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), SINGLE_FILE, &[("a", Dtype::F32, vec![values.len()], f32_bytes(values))]);
            Weights::open(dir.path()).unwrap().identity_sha256()
        };
        assert_eq!(identity(&[1.0, 2.0]), identity(&[1.0, 2.0]));
        assert_ne!(identity(&[1.0, 2.0]), identity(&[1.0, 2.5]));
    }
}
