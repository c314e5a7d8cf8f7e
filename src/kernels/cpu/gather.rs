//! The beginning of a residual stream: embeddings of token ids, or some rows of another stream.

use candle_core::{CpuStorage, Device, Result, Storage, Tensor, bail};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::rows_per_task;

/// A residual stream `[2, N, D]` in f32 that begins with the rows `rows [N]` of `x [M, D]`, which is f32, bf16 or f16; the other
/// half is scratch.
///
/// # Errors
/// When a row is not there, or a tensor is not of that kind.
pub fn begin_stream(x: &Tensor, rows: &Tensor) -> Result<Tensor> {
    let (count, width) = x.dims2()?;
    let rows = rows.to_vec1::<u32>()?;
    if let Some(row) = rows.iter().find(|&&row| row as usize >= count) {
        bail!("row {row} is asked for, and there are {count}");
    }
    let (storage, layout) = x.storage_and_layout();
    let (Storage::Cpu(storage), Some((begin, end))) = (&*storage, layout.contiguous_offsets()) else {
        bail!("rows of a stream: expected a contiguous tensor on the CPU, got {layout:?}")
    };
    // Zeroed by the system as it hands out pages: the scratch costs nothing until it is used.
    let mut stream = vec![0f32; 2 * rows.len() * width];
    let mut copy = |copy_row: &(dyn Fn(usize, &mut [f32]) + Sync)| {
        let rows_at_once = rows_per_task(width);
        let tasks = stream[..rows.len() * width].par_chunks_mut((rows_at_once * width).max(1));
        tasks.zip(rows.par_chunks(rows_at_once)).for_each(|(copies, rows)| {
            for (copy, &row) in copies.chunks_exact_mut(width.max(1)).zip(rows) {
                copy_row(row as usize * width, copy);
            }
        });
    };
    match storage {
        CpuStorage::F32(x) => copy(&|first, row| row.copy_from_slice(&x[begin..end][first..first + width])),
        CpuStorage::BF16(x) => copy(&|first, row| x[begin..end][first..first + width].convert_to_f32_slice(row)),
        CpuStorage::F16(x) => copy(&|first, row| x[begin..end][first..first + width].convert_to_f32_slice(row)),
        _ => bail!("rows of a stream: expected f32, bf16 or f16, got {:?}", x.dtype()),
    }
    Tensor::from_vec(stream, (2, rows.len(), width), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    #[test]
    fn rows_are_those_of_the_table_in_f32() -> Result<()> {
        let table = Tensor::arange(-3000f32, 4000.0, &Device::Cpu)?.reshape((70, 100))?;
        let table = (table / 7.0)?.narrow(0, 5, 60)?;
        let ids: Vec<u32> = (0..500).map(|i| i * 7 % 60).collect();
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let table = table.to_dtype(dtype)?;
            for len in [0, 1, 500] {
                let rows = Tensor::from_slice(&ids[..len], len, &Device::Cpu)?;
                let stream = begin_stream(&table, &rows)?;
                assert_eq!((stream.dims(), stream.dtype()), (&[2, len, 100][..], DType::F32));
                let expected = table.index_select(&rows, 0)?.to_dtype(DType::F32)?;
                assert_eq!(stream.get(0)?.to_vec2::<f32>()?, expected.to_vec2::<f32>()?, "{dtype:?}");
            }
        }
        let beyond = Tensor::from_slice(&[3u32, 60], 2, &Device::Cpu)?;
        assert!(begin_stream(&table, &beyond).is_err_and(|error| error.to_string().contains("row 60")));
        Ok(())
    }
}
