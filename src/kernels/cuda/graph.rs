//! Work that was recorded once and is launched as a whole.

use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::{Device, Result, bail};
use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::runtime::Runtime;

/// A recorded sequence of launches over fixed buffers.
pub struct Graph {
    graph: CudaGraph,
    runtime: Arc<Runtime>,
}

// SAFETY: a graph may be launched from any thread as long as no two use it at a time, which `&mut self` of `launch` sees to.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `work` asks of the device, without running it. It must neither allocate nor copy from or to the host.
    ///
    /// # Errors
    /// When `work` fails, or asks for what cannot be recorded.
    pub fn record(device: &Device, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let runtime = Runtime::of(device)?;
        runtime.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
        let recorded = work();
        // Also after an error, so that the stream leaves its recording mode.
        let graph = runtime.stream.end_capture(CUgraphInstantiate_flags(0));
        recorded?;
        match graph.w()? {
            Some(graph) => Ok(Self { graph, runtime }),
            None => bail!("nothing was recorded"),
        }
    }

    /// Launches all of it.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn launch(&mut self) -> Result<()> {
        self.runtime.stream.context().bind_to_thread().w()?;
        self.graph.launch().w()
    }
}
