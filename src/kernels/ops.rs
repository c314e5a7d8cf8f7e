//! What the model asks for, on whatever device its tensors are.
//!
//! On the CPU everything is f32. On a CUDA device activations and matrices have the model's dtype; norm weights, logits and
//! what heads read are f32.

use candle_core::{DType, Device, Result, Shape, Tensor};

use super::cuda;
use super::{HeadLayout, cpu};

/// The cosines and sines that rotate the tokens of a pass.
#[derive(Debug)]
pub struct RotaryAngles {
    /// `[N, D/2]`, or `[P, D/2]` with `positions`.
    pub cos: Tensor,
    /// As `cos`.
    pub sin: Tensor,
    /// Each token's row of `cos` and `sin`, `[N]`; its own number where there are none, which is on the CPU.
    pub positions: Option<Tensor>,
}

impl RotaryAngles {
    /// Of tokens at `positions [N]`, from `tables` of cosines and sines by position, `[P, D/2]` both.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn at(tables: (Tensor, Tensor), positions: Tensor) -> Result<Self> {
        let (cos, sin) = tables;
        Ok(match positions.device() {
            Device::Cuda(_) => Self { cos, sin, positions: Some(positions) },
            _ => Self { cos: cos.index_select(&positions, 0)?, sin: sin.index_select(&positions, 0)?, positions: None },
        })
    }
}

/// Which tokens of a pass make up a sequence that attends within itself.
pub struct VarlenSequences {
    /// `[B + 1]`
    cu_seq_lens: Vec<u32>,
    /// The same as a work list on a CUDA device.
    tiles: Option<cuda::AttentionTiles>,
}

impl VarlenSequences {
    /// Sequence b is tokens `cu_seq_lens[b]..cu_seq_lens[b + 1]`; on the CPU the first is 0.
    ///
    /// # Errors
    /// When the device has no memory for the list.
    pub fn new(cu_seq_lens: &[u32], window: Option<usize>, device: &Device) -> Result<Self> {
        let tiles = device.is_cuda().then(|| cuda::AttentionTiles::new(cu_seq_lens, window, device)).transpose()?;
        Ok(Self { cu_seq_lens: cu_seq_lens.to_vec(), tiles })
    }
}

/// Memory for a result that a kernel will write as a whole.
pub fn buffer(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    match device {
        Device::Cuda(_) => cuda::uninitialized(shape, dtype, device),
        _ => Tensor::zeros(shape, dtype, device),
    }
}

/// Row numbers, or token ids, as a tensor `[len]`.
pub fn indices(values: &[u32], device: &Device) -> Result<Tensor> {
    match device {
        Device::Cuda(_) => cuda::upload(values, device),
        _ => Tensor::from_slice(values, values.len(), device),
    }
}

/// The rows `rows [N]` of `x [M, width]`, `[N, width]`.
pub fn select_rows(x: &Tensor, rows: &Tensor) -> Result<Tensor> {
    match x.device() {
        Device::Cuda(_) => cuda::gather_rows(x, rows),
        _ => x.index_select(rows, 0),
    }
}

/// A residual stream `[2, N, hidden]` that begins with the rows `rows [N]` of `x [M, hidden]`; the other half is scratch.
pub fn begin_stream(x: &Tensor, rows: &Tensor) -> Result<Tensor> {
    match x.device() {
        Device::Cuda(_) => {
            let stream = cuda::uninitialized((2, rows.dim(0)?, x.dim(1)?), x.dtype(), x.device())?;
            cuda::gather_rows_into(x, rows, &stream.get(0)?)?;
            Ok(stream)
        }
        _ => cpu::begin_stream(x, rows),
    }
}

/// Norms the residual stream: `stream [2, N, D]` holds `x [N, D]` and becomes `x` and `x / sqrt(mean(x²) + eps) · weight`.
///
/// The second half is scratch for what a block of the model computes beside the stream; sums are in f32.
pub fn rms_norm(stream: &Tensor, weight: &Tensor, eps: f64) -> Result<()> {
    match stream.device() {
        Device::Cuda(_) => cuda::rms_norm(stream, weight, eps),
        _ => cpu::rms_norm(stream, weight, eps),
    }
}

/// Adds a block's result and norms in one pass: `stream [2, N, D]` of `x` and `y` becomes `x + y` and the norm of that.
pub fn add_rms_norm(stream: &Tensor, weight: &Tensor, eps: f64) -> Result<()> {
    match stream.device() {
        Device::Cuda(_) => cuda::add_rms_norm(stream, weight, eps),
        _ => cpu::add_rms_norm(stream, weight, eps),
    }
}

/// Rotates the query and key heads of `qkv [N, (H + 2K)·D]` in place: see [`cpu::rotary_embedding`] for the formula.
pub fn rotary_embedding(qkv: &Tensor, angles: &RotaryAngles, heads: HeadLayout) -> Result<()> {
    match &angles.positions {
        Some(positions) => cuda::rotary_embedding(qkv, &angles.cos, &angles.sin, positions, heads),
        None => cpu::rotary_embedding(qkv, &angles.cos, &angles.sin, heads),
    }
}

/// Causal grouped-query attention of `qkv [N, (H + 2K)·D]`, already rotated, to `context [N, H·D]`: query `i` sees key `j` of
/// its own sequence iff `0 <= i - j < window`, and scores are scaled by `1/√D`.
pub fn varlen_attention(
    context: &Tensor,
    qkv: &Tensor,
    sequences: &VarlenSequences,
    heads: HeadLayout,
    window: Option<usize>,
) -> Result<()> {
    match &sequences.tiles {
        Some(tiles) => cuda::varlen_attention(context, qkv, tiles, heads, window),
        None => cpu::varlen_attention(context, qkv, &sequences.cu_seq_lens, heads, window),
    }
}

/// `x [N, in]` times the transposed `weight [out, in]`, in f32 and on the host: `[N]` rows of `out`. For heads of few outputs.
pub fn project(x: &Tensor, weight: &Tensor) -> Result<Vec<Vec<f32>>> {
    match x.device() {
        Device::Cuda(_) => {
            let outputs = weight.dim(0)?;
            let y = cuda::uninitialized((x.dim(0)?, outputs), DType::F32, x.device())?;
            cuda::product_into(x, weight, &y)?;
            rows_of(&cuda::Download::begin(&y)?.f32()?, outputs)
        }
        _ => x.matmul(&weight.t()?)?.to_vec2::<f32>(),
    }
}

/// `x [N, width]` in f32 on the host, row by row.
pub fn host_rows(x: &Tensor) -> Result<Vec<Vec<f32>>> {
    match x.device() {
        Device::Cuda(_) => rows_of(&cuda::Download::begin(&cuda::to_f32(x)?)?.f32()?, x.dim(1)?),
        _ => x.to_vec2::<f32>(),
    }
}

/// The mean of each sequence's rows of `x [N, width]` on the host; sequence b is rows `cu_seq_lens[b]..cu_seq_lens[b + 1]`.
pub fn mean_rows(x: &Tensor, cu_seq_lens: &[u32]) -> Result<Vec<Vec<f32>>> {
    match x.device() {
        Device::Cuda(_) => rows_of(&cuda::Download::begin(&cuda::mean_pool(x, cu_seq_lens)?)?.f32()?, x.dim(1)?),
        _ => (cu_seq_lens.windows(2))
            .map(|bounds| x.narrow(0, bounds[0] as usize, (bounds[1] - bounds[0]) as usize)?.mean(0)?.to_vec1::<f32>())
            .collect(),
    }
}

fn rows_of(values: &[f32], width: usize) -> Result<Vec<Vec<f32>>> {
    Ok(values.chunks(width.max(1)).map(<[f32]>::to_vec).collect())
}
