//! One device: its stream, its products, the embedded kernels, and the ways of data to it and back.
//!
//! Everything of a device runs on one stream in the order in which it was asked for. So memory may be freed, and a block
//! of a cache given to another sequence, while its last use is still under way: what comes later runs later.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, RwLock};

use candle_core::cuda_backend::{CudaDevice, CudaStorageSlice, DeviceId, WrapErr};
use candle_core::{DType, Device, Result, Storage, Tensor, bail};
use cudarc::cublas::{result as cublas, sys as cublas_sys};
use cudarc::driver::sys::{self, CUdeviceptr, CUevent_flags, CUfunction_attribute_enum};
use cudarc::driver::{
    CudaEvent, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, LaunchConfig, PinnedHostSlice, result,
};
use cudarc::nvrtc::Ptx;

/// The kernels of `kernels.cu` for all architectures, as `build.rs` compiled them.
const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));

/// Scratch memory of cuBLAS: what NVIDIA recommends for Hopper. It is ours, so that captured steps find it again.
const CUBLAS_WORKSPACE_BYTES: usize = 32 << 20;

/// Static shared memory that a kernel may use without asking for more, in bytes.
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;

/// Pinned buffers are cut in multiples of this, so that most can be used again.
const STAGING_BYTES: usize = 1 << 16;

static RUNTIMES: LazyLock<RwLock<HashMap<DeviceId, Arc<Runtime>>>> = LazyLock::new(RwLock::default);

/// The devices that were opened, by number: each is opened once.
static OPENED: LazyLock<Mutex<HashMap<usize, Device>>> = LazyLock::new(Mutex::default);

/// What belongs to one opened device.
pub(super) struct Runtime {
    pub device: CudaDevice,
    pub stream: Arc<CudaStream>,
    module: Arc<CudaModule>,
    /// By name and dynamic shared memory, which has to be asked for.
    functions: RwLock<HashMap<(String, u32), CudaFunction>>,
    /// A handle serves one caller at a time.
    products: Mutex<()>,
    _workspace: CudaSlice<u8>,
    /// Pinned memory that waits to be used again.
    staging: Mutex<Vec<Staging>>,
}

/// Page-locked memory, which the device copies from and to by itself.
struct Staging {
    bytes: PinnedHostSlice<u8>,
    /// The last copy that used it.
    used: CudaEvent,
}

/// A contiguous tensor as kernels see it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Buffer {
    pub pointer: CUdeviceptr,
    pub len: usize,
    pub dtype: DType,
}

/// Opens the device of this number.
///
/// # Errors
/// When no driver or no such device answers, or it cannot run the embedded kernels.
pub fn open(ordinal: usize) -> Result<Device> {
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = opened.get(&ordinal) {
        return Ok(device.clone());
    }
    let device = start(ordinal)?;
    opened.insert(ordinal, device.clone());
    Ok(device)
}

fn start(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    let Device::Cuda(cuda) = &device else { bail!("device {ordinal} is none of CUDA") };
    let stream = cuda.cuda_stream();
    // SAFETY: every use of this device is on its one stream, which `Device::Cuda` and `Runtime` share.
    unsafe { cuda.disable_event_tracking() };
    let context = stream.context();
    // Freed memory stays with the process: giving it back and asking again would stop the stream at every batch.
    let mut threshold = u64::MAX;
    // SAFETY: the device is the context's, and the attribute is a u64.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device()).w()?;
        let threshold: *mut u64 = &mut threshold;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, attribute, threshold.cast()).w()?;
    }
    let module = context.load_module(Ptx::from_binary(IMAGE.to_vec())).w()?;
    // SAFETY: cuBLAS writes to its workspace before it reads there.
    let workspace = unsafe { stream.alloc::<u8>(CUBLAS_WORKSPACE_BYTES) }.w()?;
    let handle = *cuda.cublas_handle().handle();
    // SAFETY: the handle is the device's, and the workspace lives as long as the runtime, which lives as long as the process.
    unsafe {
        let (pointer, _) = workspace.device_ptr(&stream);
        cublas_sys::cublasSetWorkspace_v2(handle, pointer as *mut _, CUBLAS_WORKSPACE_BYTES).result().w()?;
        // Sums that are split over blocks stay in f32 until they are complete.
        let mode = cublas_sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
        cublas_sys::cublasSetMathMode(handle, mode).result().w()?;
    }
    let runtime = Runtime {
        device: cuda.clone(),
        stream,
        module,
        functions: RwLock::default(),
        products: Mutex::default(),
        _workspace: workspace,
        staging: Mutex::default(),
    };
    RUNTIMES.write().unwrap_or_else(PoisonError::into_inner).insert(cuda.id(), Arc::new(runtime));
    Ok(device)
}

/// What the device is called.
pub fn name(device: &Device) -> Result<String> {
    Runtime::of(device)?.stream.context().name().w()
}

/// Bytes of the device's memory that are free, and all of them, as the driver tells; what this process holds without using it
/// is free.
pub fn memory_bytes(device: &Device) -> Result<(usize, usize)> {
    let runtime = Runtime::of(device)?;
    let context = runtime.stream.context();
    let (free, total) = context.mem_get_info().w()?;
    let (mut reserved, mut used) = (0u64, 0u64);
    // SAFETY: the device is the context's, and both attributes are u64.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device()).w()?;
        let (reserved, used): (*mut u64, *mut u64) = (&mut reserved, &mut used);
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT;
        result::mem_pool::get_attribute(pool, attribute, reserved.cast()).w()?;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT;
        result::mem_pool::get_attribute(pool, attribute, used.cast()).w()?;
    }
    Ok((free + reserved.saturating_sub(used) as usize, total))
}

impl Runtime {
    /// The runtime of a device that [`open`] opened.
    pub fn of(device: &Device) -> Result<Arc<Self>> {
        let Device::Cuda(cuda) = device else { bail!("expected a CUDA device, got {device:?}") };
        match RUNTIMES.read().unwrap_or_else(PoisonError::into_inner).get(&cuda.id()) {
            Some(runtime) => Ok(runtime.clone()),
            None => bail!("the CUDA device was not opened by kernels::cuda::open"),
        }
    }

    /// The kernel of this name, allowed to use `shared_bytes` of dynamic shared memory.
    pub fn function(&self, name: &str, shared_bytes: u32) -> Result<CudaFunction> {
        let key = (name.to_owned(), shared_bytes);
        if let Some(function) = self.functions.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(function.clone());
        }
        self.stream.context().bind_to_thread().w()?;
        let function = self.module.load_function(name).w()?;
        if shared_bytes > DEFAULT_SHARED_BYTES {
            let attribute = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, shared_bytes as i32).w()?;
        }
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        Ok(functions.entry(key).or_insert(function).clone())
    }

    /// `y [N, out]` = `x [N, in]` times the transposed `weight [out, in]`, summed in f32; `y` may be f32 whatever the others.
    pub fn product(&self, x: &Tensor, weight: &Tensor, y: &Tensor) -> Result<()> {
        let ((rows, depth), (outputs, columns)) = (x.dims2()?, weight.dims2()?);
        if depth != columns || y.dims2()? != (rows, outputs) {
            bail!("product: {:?} by {:?} does not give {:?}", x.dims(), weight.dims(), y.dims());
        }
        if rows == 0 || outputs == 0 {
            return Ok(());
        }
        let (x, weight, y) = (buffer(x)?, buffer(weight)?, buffer(y)?);
        if x.dtype != weight.dtype || (y.dtype != x.dtype && y.dtype != DType::F32) {
            bail!("product: {:?} by {:?} to {:?}", x.dtype, weight.dtype, y.dtype);
        }
        self.stream.context().bind_to_thread().w()?;
        let (alpha, beta) = (1f32, 0f32);
        let (alpha, beta): (*const f32, *const f32) = (&alpha, &beta);
        let _one_at_a_time: MutexGuard<()> = self.products.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: shapes and dtypes were checked above; column-major, as cuBLAS counts, the three are the transposed ones.
        unsafe {
            cublas::gemm_ex(
                *self.device.cublas_handle().handle(),
                cublas_sys::cublasOperation_t::CUBLAS_OP_T,
                cublas_sys::cublasOperation_t::CUBLAS_OP_N,
                outputs as i32,
                rows as i32,
                depth as i32,
                alpha.cast(),
                weight.pointer as *const _,
                data_type(weight.dtype)?,
                depth as i32,
                x.pointer as *const _,
                data_type(x.dtype)?,
                depth as i32,
                beta.cast(),
                y.pointer as *mut _,
                data_type(y.dtype)?,
                outputs as i32,
                cublas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .w()
    }

    fn event(&self) -> Result<CudaEvent> {
        self.stream.context().new_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC)).w()
    }

    /// Pinned memory of at least `bytes` whose last copy is over.
    fn take_staging(&self, bytes: usize) -> Result<Staging> {
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |held: &Staging| held.bytes.len() >= bytes && held.used.is_complete();
        if let Some(index) = staging.iter().position(fits) {
            return Ok(staging.swap_remove(index));
        }
        drop(staging);
        let len = bytes.next_multiple_of(STAGING_BYTES);
        // SAFETY: it is written before it is read: by us before an upload, by the device in a download.
        let bytes = unsafe { self.stream.context().alloc_pinned_with_flags(len, 0) }.w()?;
        Ok(Staging { bytes, used: self.event()? })
    }

    fn give_back(&self, staging: Staging) {
        self.staging.lock().unwrap_or_else(PoisonError::into_inner).push(staging);
    }
}

fn data_type(dtype: DType) -> Result<cublas_sys::cudaDataType> {
    match dtype {
        DType::BF16 => Ok(cublas_sys::cudaDataType::CUDA_R_16BF),
        DType::F16 => Ok(cublas_sys::cudaDataType::CUDA_R_16F),
        DType::F32 => Ok(cublas_sys::cudaDataType::CUDA_R_32F),
        other => bail!("product: no products in {other:?}"),
    }
}

/// The ending of a kernel's name for values of `dtype`.
pub(super) fn suffix(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::BF16 => Ok("bf16"),
        DType::F16 => Ok("f16"),
        DType::F32 => Ok("f32"),
        other => bail!("no kernels for {other:?}"),
    }
}

/// A grid of blocks of `threads`.
pub(super) fn grid(x: usize, y: usize, z: usize, threads: u32, shared_bytes: u32) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (x as u32, y as u32, z as u32),
        block_dim: (threads, 1, 1),
        shared_mem_bytes: shared_bytes,
    }
}

/// Launches kernel `$name` of `$runtime` with `$config` and its arguments, in the order and of the types of its signature.
macro_rules! launch {
    ($runtime:expr, $name:expr, $config:expr, $($argument:expr),* $(,)?) => {{
        let config: cudarc::driver::LaunchConfig = $config;
        let function = $runtime.function($name, config.shared_mem_bytes)?;
        let mut builder = $runtime.stream.launch_builder(&function);
        $(
            let argument = $argument;
            cudarc::driver::PushKernelArg::arg(&mut builder, &argument);
        )*
        // SAFETY: the caller passes what the kernel's signature in `src/kernels/cuda/*.cu` asks for, having checked shapes and
        // dtypes; the tensors behind the pointers live until later work of the same stream frees them.
        candle_core::cuda_backend::WrapErr::w(unsafe { builder.launch(config) }).map(|_| ())
    }};
}
pub(super) use launch;

/// The memory of a contiguous tensor on a CUDA device.
pub(super) fn buffer(tensor: &Tensor) -> Result<Buffer> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("the tensor is not on a CUDA device") };
    let Some((begin, end)) = layout.contiguous_offsets() else { bail!("expected a contiguous tensor, got {layout:?}") };
    let stream = storage.device.cuda_stream();
    let pointer = match &storage.slice {
        CudaStorageSlice::BF16(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::F16(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::F32(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::U32(slice) => slice.device_ptr(&stream).0,
        _ => bail!("no kernels for {:?}", tensor.dtype()),
    };
    let dtype = tensor.dtype();
    Ok(Buffer { pointer: pointer + (begin * dtype.size_in_bytes()) as CUdeviceptr, len: end - begin, dtype })
}

/// As [`buffer`], of the dtype that is expected.
pub(super) fn buffer_of(tensor: &Tensor, dtype: DType) -> Result<CUdeviceptr> {
    let buffer = buffer(tensor)?;
    if buffer.dtype != dtype {
        bail!("expected {dtype:?}, got {:?}", buffer.dtype);
    }
    Ok(buffer.pointer)
}

/// Memory of this shape; what it holds is not meaningful.
pub fn uninitialized(shape: impl Into<candle_core::Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    // SAFETY: plain numbers, of which any bits are some; kernels write each buffer before they read it.
    unsafe { Tensor::empty(shape, dtype, device) }
}

/// Copies `values` to a new tensor `[len]`; the caller need not wait for the device.
pub fn upload(values: &[u32], device: &Device) -> Result<Tensor> {
    // No memory is no buffer: a list of nothing has room for one.
    let tensor = uninitialized(values.len().max(1), DType::U32, device)?.narrow(0, 0, values.len())?;
    upload_to(values, &tensor)?;
    Ok(tensor)
}

/// As [`upload`], to the beginning of `tensor [len]`.
pub fn upload_to(values: &[u32], tensor: &Tensor) -> Result<()> {
    if values.is_empty() {
        return Ok(());
    }
    let runtime = Runtime::of(tensor.device())?;
    if tensor.elem_count() < values.len() {
        bail!("upload: {} values to {:?}", values.len(), tensor.dims());
    }
    let pointer = buffer_of(tensor, DType::U32)?;
    let mut staging = runtime.take_staging(size_of_val(values))?;
    let staged = &mut staging.bytes.as_mut_slice().w()?[..size_of_val(values)];
    for (bytes, value) in staged.chunks_exact_mut(size_of::<u32>()).zip(values) {
        bytes.copy_from_slice(&value.to_ne_bytes());
    }
    // SAFETY: the destination is as long as was checked above; the pinned memory is not touched before `used` is complete.
    unsafe { result::memcpy_htod_async(pointer, staged, runtime.stream.cu_stream()) }.w()?;
    staging.used.record(&runtime.stream).w()?;
    runtime.give_back(staging);
    Ok(())
}

/// Values on their way to the host.
pub struct Download {
    runtime: Arc<Runtime>,
    staging: Option<Staging>,
    len: usize,
}

impl Download {
    /// Begins to copy a tensor of 32-bit values, behind all work so far.
    pub fn begin(tensor: &Tensor) -> Result<Self> {
        let runtime = Runtime::of(tensor.device())?;
        let Buffer { pointer, len, dtype } = buffer(tensor)?;
        if !matches!(dtype, DType::F32 | DType::U32) {
            bail!("download: expected 32-bit values, got {dtype:?}");
        }
        let mut staging = runtime.take_staging((len * size_of::<u32>()).max(1))?;
        if len > 0 {
            let target = &mut staging.bytes.as_mut_slice().w()?[..len * size_of::<u32>()];
            // SAFETY: the source is as long as the target; the target is not read before `used` is complete.
            unsafe { result::memcpy_dtoh_async(target, pointer, runtime.stream.cu_stream()) }.w()?;
        }
        staging.used.record(&runtime.stream).w()?;
        Ok(Self { runtime, staging: Some(staging), len })
    }

    /// Waits for the values, and for nothing that was asked of the device later.
    pub fn f32(self) -> Result<Vec<f32>> {
        Ok(self.u32()?.into_iter().map(f32::from_bits).collect())
    }

    /// As [`Download::f32`].
    pub fn u32(mut self) -> Result<Vec<u32>> {
        let Some(staging) = self.staging.take() else { bail!("download: taken before") };
        staging.used.synchronize().w()?;
        let bytes = &staging.bytes.as_slice().w()?[..self.len * size_of::<u32>()];
        let (chunks, _) = bytes.as_chunks::<4>();
        let values = chunks.iter().map(|&chunk| u32::from_ne_bytes(chunk)).collect();
        self.runtime.give_back(staging);
        Ok(values)
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        if let Some(staging) = self.staging.take() {
            self.runtime.give_back(staging); // not used again before its copy is complete
        }
    }
}
