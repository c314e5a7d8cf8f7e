//! Weights in the layout that products read: panels of 64 outputs, input by input.

use candle_core::{CpuStorage, DType, Result, Storage, Tensor, WithDType, bail};
use half::{bf16, f16};
use rayon::prelude::*;

use super::contiguous;
use super::half_product::{GROUP_INPUTS, MAX_F16_WEIGHT, warn_if_emulated};

/// Outputs of a panel.
pub(super) const PANEL: usize = 64;
/// Units of a panel that holds a gate and a value for each.
pub(super) const GATED: usize = PANEL / 2;

/// Packs `weight [out, in]` for [`super::packed_linear`]: `[⌈out/64⌉, in, 64]`, the last panel filled up with zeros.
///
/// An f32 weight whose every value is a bf16 number, or an f16 number, is kept as such, which halves what a product reads
/// and changes no result. An f16 weight is packed for [`super::Arithmetic::F16`], which takes values up to
/// [`MAX_F16_WEIGHT`].
pub fn pack_linear(weight: &Tensor) -> Result<Tensor> {
    let (outputs, _) = weight.dims2()?;
    pack(weight, outputs.div_ceil(PANEL), |output| Some(output).filter(|&output| output < outputs))
}

/// Packs gate and up projections, `weight [2·I, in]` with the gate first, for [`super::packed_swiglu_into`]: `[⌈I/32⌉, in, 64]`.
///
/// A panel has 32 columns of the gate and then the same 32 of the up projection. Precision as [`pack_linear`].
pub fn pack_gate_up(weight: &Tensor) -> Result<Tensor> {
    let (both, _) = weight.dims2()?;
    if !both.is_multiple_of(2) {
        bail!("gate and up projections: {both} rows are not a gate and as many values");
    }
    let width = both / 2;
    pack(weight, width.div_ceil(GATED), |column| {
        let unit = column / PANEL * GATED + column % GATED;
        (unit < width).then_some(unit + column % PANEL / GATED * width)
    })
}

/// Panels whose columns, counted through, are the rows of `weight [out, in]` that `row_of` names; others are zero.
fn pack(weight: &Tensor, panels: usize, row_of: impl Fn(usize) -> Option<usize> + Sync) -> Result<Tensor> {
    let (_, depth) = weight.dims2()?;
    let (storage, layout) = weight.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { bail!("packing: the weight is not on the CPU") };
    if let CpuStorage::F16(values) = storage {
        let Some((begin, end)) = layout.contiguous_offsets() else { bail!("packing: expected a contiguous tensor") };
        let values = &values[begin..end];
        if let Some(value) = values.par_iter().find_any(|value| value.to_f32().abs() > MAX_F16_WEIGHT) {
            bail!("a weight of {value} is beyond {MAX_F16_WEIGHT}, up to which products are computed in f16; take f32");
        }
        warn_if_emulated();
        return pack_in_pairs(values, depth, panels, row_of);
    }
    let values = contiguous(storage, layout, "packing")?;
    match narrowest(values) {
        DType::BF16 => pack_as(values, depth, panels, row_of, bf16::from_f32),
        DType::F16 => pack_as(values, depth, panels, row_of, f16::from_f32),
        _ => pack_as(values, depth, panels, row_of, |value| value),
    }
}

/// The smallest type that holds every value as it is.
fn narrowest(values: &[f32]) -> DType {
    if values.par_iter().all(|value| value.to_bits() & 0xffff == 0) {
        DType::BF16
    } else if values.par_iter().all(|&value| f16::from_f32(value).to_f32() == value) {
        DType::F16
    } else {
        DType::F32
    }
}

/// `weight` in half precision where that holds every value of it.
pub fn narrowed(weight: Tensor) -> Result<Tensor> {
    let dtype = {
        let (storage, layout) = weight.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { bail!("the weight is not on the CPU") };
        narrowest(contiguous(storage, layout, "weight")?)
    };
    weight.to_dtype(dtype)
}

fn pack_as<V: Copy + Sync, W: WithDType + Send>(
    values: &[V],
    depth: usize,
    panels: usize,
    row_of: impl Fn(usize) -> Option<usize> + Sync,
    convert: fn(V) -> W,
) -> Result<Tensor> {
    let mut packed = vec![W::zero(); panels * depth * PANEL];
    packed.par_chunks_mut((depth * PANEL).max(1)).enumerate().for_each(|(panel, block)| {
        for column in 0..PANEL {
            let Some(row) = row_of(panel * PANEL + column) else { continue };
            for (inputs, &value) in block.chunks_exact_mut(PANEL).zip(&values[row * depth..][..depth]) {
                inputs[column] = convert(value);
            }
        }
    });
    Tensor::from_vec(packed, (panels, depth, PANEL), &candle_core::Device::Cpu)
}

/// Panels of two halves, `[panels, 2, 4·⌈depth/8⌉, PANEL/2, 2]`: a column's weights of an even and of the odd input after it are
/// neighbours.
fn pack_in_pairs(
    values: &[f16],
    depth: usize,
    panels: usize,
    row_of: impl Fn(usize) -> Option<usize> + Sync,
) -> Result<Tensor> {
    let padded = depth.next_multiple_of(GROUP_INPUTS);
    let mut packed = vec![f16::ZERO; panels * padded * PANEL];
    packed.par_chunks_mut((padded * PANEL).max(1)).enumerate().for_each(|(panel, block)| {
        for column in 0..PANEL {
            let Some(row) = row_of(panel * PANEL + column) else { continue };
            let half = &mut block[column / (PANEL / 2) * padded * PANEL / 2..];
            for (k, &value) in values[row * depth..][..depth].iter().enumerate() {
                half[k / 2 * PANEL + column % (PANEL / 2) * 2 + k % 2] = value;
            }
        }
    });
    Tensor::from_vec(packed, (panels, padded, PANEL), &candle_core::Device::Cpu)
}
