//! Rotary position embedding: the cosines and sines of each position.

use std::sync::RwLock;

use candle_core::{Device, Result, Tensor};

use crate::kernels::{self, RotaryAngles};

/// Tables cos and sin `[positions, D/2]`, grown to the longest row seen.
///
/// Su et al., "RoFormer" (arXiv:2104.09864), with the half-split pairing and the f32 rounding of transformers'
/// `MistralRotaryEmbedding` (`models/mistral/modeling_mistral.py`, 5.23): angle(p, i) = p · θ^(−2i/D).
#[derive(Debug)]
pub struct RotaryTable {
    inv_freq: Vec<f32>,
    device: Device,
    tables: RwLock<Option<(Tensor, Tensor)>>,
}

/// Positions are tabulated in multiples of this, so that the table grows seldom.
const GROWTH: usize = 1024;

impl RotaryTable {
    /// A table for heads of width `head_dim` and base `theta`.
    pub fn new(head_dim: usize, theta: f64, device: &Device) -> Self {
        let inv_freq = (0..head_dim / 2).map(|i| 1.0 / (theta as f32).powf(2.0 * i as f32 / head_dim as f32)).collect();
        Self { inv_freq, device: device.clone(), tables: RwLock::new(None) }
    }

    /// cos and sin of each token, `[N, D/2]` both.
    ///
    /// # Errors
    /// When a tensor operation fails, or a panic poisoned the table.
    pub fn gather(&self, position_ids: &[u32]) -> Result<(Tensor, Tensor)> {
        let positions = position_ids.iter().max().map_or(0, |&p| p as usize) + 1;
        let (cos, sin) = self.tables(positions)?;
        let index = kernels::indices(position_ids, &self.device)?;
        Ok((cos.index_select(&index, 0)?, sin.index_select(&index, 0)?))
    }

    /// What rotates tokens at `position_ids [N]`, as the device needs it.
    ///
    /// # Errors
    /// As [`RotaryTable::gather`].
    pub fn angles(&self, position_ids: &[u32]) -> Result<RotaryAngles> {
        let longest = position_ids.iter().max().map_or(0, |&p| p as usize) + 1;
        RotaryAngles::at(self.tables(longest)?, kernels::indices(position_ids, &self.device)?)
    }

    /// What rotates tokens at `positions [N]`, which are below `longest`, on a CUDA device.
    ///
    /// # Errors
    /// As [`RotaryTable::gather`].
    pub(super) fn angles_at(&self, positions: Tensor, longest: usize) -> Result<RotaryAngles> {
        let (cos, sin) = self.tables(longest)?;
        Ok(RotaryAngles { cos, sin, positions: Some(positions) })
    }

    fn tables(&self, positions: usize) -> Result<(Tensor, Tensor)> {
        let poisoned = |_| candle_core::Error::Msg("the rotary table was lost in a panic".into());
        if let Some((cos, sin)) = &*self.tables.read().map_err(|e| poisoned(e.to_string()))?
            && cos.dim(0)? >= positions
        {
            return Ok((cos.clone(), sin.clone()));
        }
        let positions = positions.next_multiple_of(GROWTH);
        let angles: Vec<f32> =
            (0..positions).flat_map(|p| self.inv_freq.iter().map(move |frequency| p as f32 * frequency)).collect();
        let table = |function: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().map(|&angle| function(angle)).collect();
            Tensor::from_vec(values, (positions, self.inv_freq.len()), &self.device)
        };
        let grown = (table(f32::cos)?, table(f32::sin)?);
        *self.tables.write().map_err(|e| poisoned(e.to_string()))? = Some(grown.clone());
        Ok(grown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn angles_follow_the_formula_and_the_table_grows() {
        let table = RotaryTable::new(4, 10_000.0, &Device::Cpu);
        for position in [0u32, 3, 5000] {
            let (cos, sin) = table.gather(&[position]).unwrap();
            let (cos, sin) = (cos.to_vec2::<f32>().unwrap(), sin.to_vec2::<f32>().unwrap());
            for (i, frequency) in [1.0f64, 0.01].into_iter().enumerate() {
                let angle = f64::from(position) * frequency;
                assert!((f64::from(cos[0][i]) - angle.cos()).abs() < 1e-3 * (1.0 + angle * 1e-3), "{position} {i}");
                assert!((f64::from(sin[0][i]) - angle.sin()).abs() < 1e-3 * (1.0 + angle * 1e-3), "{position} {i}");
            }
        }
    }
}
