//! The CUDA kernels of a build without them: the same types, none of which can be made, so that callers need no `cfg`.
//!
//! After candle's `dummy_cuda_backend.rs`.

use std::sync::Arc;

use candle_core::{DType, Device, Error, Result, Shape, Tensor};

use super::HeadLayout;

/// Whether this build has these kernels.
pub const IS_BUILT: bool = false;

/// Positions of a block of a key/value cache.
pub const BLOCK_TOKENS: usize = 256;

/// The memory of a device's key/value caches.
#[derive(Debug)]
pub enum BlockPool {}

/// One sequence's blocks.
#[derive(Debug)]
pub enum BlockTable {}

/// What a pass over new tokens needs to know of their sequences.
#[derive(Debug)]
pub enum CacheBatch {}

/// The work list of attention within fresh sequences.
#[derive(Debug)]
pub enum AttentionTiles {}

/// Values on their way to the host.
#[derive(Debug)]
pub enum Download {}

/// Work that was recorded once and is launched as a whole.
#[derive(Debug)]
pub enum Graph {}

fn absent<T>() -> Result<T> {
    Err(Error::NotCompiledWithCudaSupport)
}

impl BlockPool {
    pub fn new(_: HeadLayout, _: usize, _: DType, _: usize, _: &Device) -> Result<Self> {
        absent()
    }

    pub fn block_bytes(_: HeadLayout, _: usize, _: DType) -> usize {
        0
    }

    pub fn bytes(&self) -> usize {
        match *self {}
    }

    pub fn table(self: &Arc<Self>, _: usize) -> Result<BlockTable> {
        match **self {}
    }
}

impl BlockTable {
    pub fn capacity(&self) -> usize {
        match *self {}
    }

    pub fn fork(&self) -> Result<Self> {
        match *self {}
    }
}

impl CacheBatch {
    pub fn new(_: &[u32], _: &[usize], _: &[&BlockTable], _: usize) -> Result<Self> {
        absent()
    }

    pub fn lanes(pool: &Arc<BlockPool>, _: usize, _: usize) -> Result<Self> {
        match **pool {}
    }

    pub fn set_lanes(&self, _: &[&BlockTable], _: &[usize]) -> Result<()> {
        match *self {}
    }

    pub fn close_lane(&self, _: usize) -> Result<()> {
        match *self {}
    }

    pub fn sequence_ends(&self) -> &Tensor {
        match *self {}
    }
}

impl AttentionTiles {
    pub fn new(_: &[u32], _: Option<usize>, _: &Device) -> Result<Self> {
        absent()
    }

    pub fn is_empty(&self) -> bool {
        match *self {}
    }
}

impl Download {
    pub fn begin(_: &Tensor) -> Result<Self> {
        absent()
    }

    pub fn f32(self) -> Result<Vec<f32>> {
        match self {}
    }

    pub fn u32(self) -> Result<Vec<u32>> {
        match self {}
    }
}

impl Graph {
    pub fn record(_: &Device, _: impl FnOnce() -> Result<()>) -> Result<Self> {
        absent()
    }

    pub fn launch(&mut self) -> Result<()> {
        match *self {}
    }
}

pub fn open(_: usize) -> Result<Device> {
    absent()
}

pub fn name(_: &Device) -> Result<String> {
    absent()
}

pub fn memory_bytes(_: &Device) -> Result<(usize, usize)> {
    absent()
}

pub fn uninitialized(_: impl Into<Shape>, _: DType, _: &Device) -> Result<Tensor> {
    absent()
}

pub fn upload(_: &[u32], _: &Device) -> Result<Tensor> {
    absent()
}

pub fn upload_to(_: &[u32], _: &Tensor) -> Result<()> {
    absent()
}

pub fn gather_rows_into(_: &Tensor, _: &Tensor, _: &Tensor) -> Result<()> {
    absent()
}

pub fn gather_rows(_: &Tensor, _: &Tensor) -> Result<Tensor> {
    absent()
}

pub fn to_f32(_: &Tensor) -> Result<Tensor> {
    absent()
}

pub fn rms_norm(_: &Tensor, _: &Tensor, _: f64) -> Result<()> {
    absent()
}

pub fn add_rms_norm(_: &Tensor, _: &Tensor, _: f64) -> Result<()> {
    absent()
}

pub fn rotary_embedding(_: &Tensor, _: &Tensor, _: &Tensor, _: &Tensor, _: HeadLayout) -> Result<()> {
    absent()
}

pub fn rotary_cache_write(
    _: &Tensor,
    _: &Tensor,
    _: &Tensor,
    _: &Tensor,
    pool: &BlockPool,
    _: usize,
    _: &CacheBatch,
) -> Result<()> {
    match *pool {}
}

pub fn decode_attention(_: &Tensor, _: &Tensor, _: &Tensor, pool: &BlockPool, _: usize, _: &CacheBatch) -> Result<()> {
    match *pool {}
}

pub fn varlen_attention(_: &Tensor, _: &Tensor, tiles: &AttentionTiles, _: HeadLayout, _: Option<usize>) -> Result<()> {
    match *tiles {}
}

pub fn silu_mul(_: &Tensor, _: &Tensor) -> Result<()> {
    absent()
}

pub fn argmax_logprob(_: &Tensor, _: &Tensor, _: &Tensor) -> Result<()> {
    absent()
}

pub fn target_logprobs(_: &Tensor, _: &Tensor) -> Result<Tensor> {
    absent()
}

pub fn advance_positions(_: &Tensor, _: &Tensor) -> Result<()> {
    absent()
}

pub fn mean_pool(_: &Tensor, _: &[u32]) -> Result<Tensor> {
    absent()
}

pub fn product_into(_: &Tensor, _: &Tensor, _: &Tensor) -> Result<()> {
    absent()
}
