//! The CUDA kernels' own sources, compiled for the CPU and run in an emulation of CUDA's execution model
//! (`cuda_on_cpu.h`), against the oracle.

mod attention;
mod elementwise;

use std::collections::hash_map::DefaultHasher;
use std::ffi::{CStr, CString, c_void};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

type LaunchFn = unsafe extern "C" fn(*const i8, *const u32, *const u32, usize, *mut *mut c_void, u64) -> i32;

/// The kernels as a shared library.
struct Library {
    launch: LaunchFn,
    allocate: unsafe extern "C" fn(usize) -> *mut c_void,
    free: unsafe extern "C" fn(*mut c_void, usize),
}

static LIBRARY: LazyLock<Library> = LazyLock::new(|| {
    let path = CString::new(build().to_str().unwrap()).unwrap();
    // SAFETY: the library is ours, and the types of its functions are those of launch.h.
    unsafe {
        let handle = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        assert!(!handle.is_null(), "cannot load {path:?}: {:?}", CStr::from_ptr(libc::dlerror()));
        let symbol = |name: &CStr| {
            let symbol = libc::dlsym(handle, name.as_ptr());
            assert!(!symbol.is_null(), "{path:?} lacks {name:?}");
            symbol
        };
        Library {
            launch: std::mem::transmute::<*mut c_void, LaunchFn>(symbol(c"cuda_on_cpu_launch")),
            allocate: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(usize) -> *mut c_void>(symbol(
                c"cuda_on_cpu_allocate",
            )),
            free: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_void, usize)>(symbol(
                c"cuda_on_cpu_free",
            )),
        }
    }
});

/// Compiles the kernels, unless a library of the same sources is there.
fn build() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_on_cpu");
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernels/cuda");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let mut hasher = DefaultHasher::new();
    compiler.hash(&mut hasher);
    let mut sources: Vec<_> = [&tests, &kernels]
        .into_iter()
        .flat_map(|dir| dir.read_dir().unwrap())
        .map(|file| file.unwrap().path())
        .collect();
    sources.sort();
    for source in
        sources.iter().filter(|path| path.is_file() && path.extension().is_none_or(|extension| extension != "rs"))
    {
        source.hash(&mut hasher);
        std::fs::read(source).unwrap().hash(&mut hasher);
    }
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("libcuda_on_cpu-{:016x}.so", hasher.finish()));
    if library.exists() {
        return library;
    }
    let unfinished = library.with_extension(format!("{}.so", std::process::id()));
    let output = Command::new(&compiler)
        .arg("-I")
        .arg(&tests)
        .args(["-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-o"])
        .arg(&unfinished)
        .args([tests.join("cuda_on_cpu.cpp"), tests.join("kernels.cpp")])
        .output()
        .unwrap_or_else(|error| {
            panic!(
                "the CUDA kernels are tested on the CPU, which needs a C++17 compiler: '{compiler}' (or $CXX): {error}"
            )
        });
    assert!(output.status.success(), "{compiler}: {}", String::from_utf8_lossy(&output.stderr));
    std::fs::rename(unfinished, &library).unwrap();
    library
}

/// Memory that a kernel sees as the device's: NaN at first, and beyond its end nothing may be touched.
struct Buffer {
    memory: *mut c_void,
    bytes: usize,
    dtype: DType,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated by the same library with this size.
        unsafe { (LIBRARY.free)(self.memory, self.bytes) }
    }
}

impl Buffer {
    fn new(count: usize, dtype: DType) -> Self {
        let bytes = count * dtype.size_in_bytes();
        // SAFETY: any size is allowed.
        let memory = unsafe { (LIBRARY.allocate)(bytes) };
        assert!(!memory.is_null());
        Self { memory, bytes, dtype }
    }

    fn of<V: Copy>(values: &[V], dtype: DType) -> Self {
        let buffer = Self::new(values.len(), dtype);
        assert_eq!(size_of_val(values), buffer.bytes);
        // SAFETY: both are `bytes` long.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr().cast(), buffer.memory.cast::<u8>(), buffer.bytes) };
        buffer
    }

    fn u32(values: &[u32]) -> Self {
        Self::of(values, DType::U32)
    }

    /// `values`, rounded to `dtype`.
    fn floats(values: &[f32], dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::of(values, dtype),
            DType::BF16 => Self::of(&values.iter().map(|&value| bf16::from_f32(value)).collect::<Vec<_>>(), dtype),
            DType::F16 => Self::of(&values.iter().map(|&value| f16::from_f32(value)).collect::<Vec<_>>(), dtype),
            _ => unreachable!(),
        }
    }

    fn read<V: Copy>(&self) -> Vec<V> {
        // SAFETY: the memory is initialised, `bytes` long and aligned to 16.
        unsafe { std::slice::from_raw_parts(self.memory.cast::<V>(), self.bytes / size_of::<V>()) }.to_vec()
    }

    fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            DType::F32 => self.read(),
            DType::BF16 => self.read::<bf16>().into_iter().map(f32::from).collect(),
            DType::F16 => self.read::<f16>().into_iter().map(f32::from).collect(),
            _ => unreachable!(),
        }
    }

    /// The values of a `shape [rows, columns]` as f64.
    fn tensor(&self, shape: (usize, usize)) -> Tensor {
        Tensor::from_vec(self.to_f32(), shape, &Device::Cpu).unwrap().to_dtype(DType::F64).unwrap()
    }
}

/// An argument of a kernel.
enum Arg<'a> {
    Buffer(&'a Buffer),
    Null,
    U32(usize),
    U64(usize),
    F32(f64),
}

impl<'a> From<&'a Buffer> for Arg<'a> {
    fn from(buffer: &'a Buffer) -> Self {
        Self::Buffer(buffer)
    }
}

/// The name of `kernel` for activations of `dtype`.
fn named(kernel: &str, dtype: DType) -> String {
    format!("{kernel}_{}", dtype.as_str())
}

/// Runs a kernel; `seed` shuffles its threads.
fn launch(kernel: &str, grid: (usize, usize, usize), block: usize, shared_bytes: usize, args: &[Arg], seed: u64) {
    let name = CString::new(kernel).unwrap();
    // Eight bytes an argument, of which the kernel reads what it needs: all of our hosts are little-endian.
    let mut values: Vec<u64> = args
        .iter()
        .map(|arg| match *arg {
            Arg::Buffer(buffer) => buffer.memory as u64,
            Arg::Null => 0,
            Arg::U32(value) => u64::from(u32::try_from(value).unwrap()),
            Arg::U64(value) => value as u64,
            Arg::F32(value) => u64::from((value as f32).to_bits()),
        })
        .collect();
    let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
    let grid = [grid.0 as u32, grid.1 as u32, grid.2 as u32];
    let block = [block as u32, 1, 1];
    // SAFETY: the arguments are what the kernel of that name takes, as its test says.
    let found = unsafe {
        (LIBRARY.launch)(name.as_ptr().cast(), grid.as_ptr(), block.as_ptr(), shared_bytes, pointers.as_mut_ptr(), seed)
    };
    assert_eq!(found, 1, "no kernel is called {kernel}");
}

/// What `run` gives, which has to be the same bits in whatever order threads run.
fn in_any_order(run: impl Fn(u64) -> Vec<f32>) -> Vec<f32> {
    let (once, again) = (run(1), run(2));
    assert!(once.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits()), "it depends on the order of threads");
    once
}

/// Uniform values in [-scale, scale) that depend on the seed only.
fn random(count: usize, scale: f32, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale
        })
        .collect()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, relative to the larger of 1 and the expected value; infinite where one is NaN.
fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let differences = found.iter().zip(expected).map(|(x, y)| (x - y).abs() / y.abs().max(1.0));
    differences.fold(0.0, |largest, d| if d.is_nan() { f32::INFINITY } else { d.max(largest) })
}

/// Half a unit in the last place of a value of `dtype`, relative to the value, and what sums in f32 add to it.
fn rounding(dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => 1.0 / 256.0,
        DType::F16 => 1.0 / 2048.0,
        _ => 5e-6,
    }
}
