//! Compiles the CUDA kernels for the `cuda` feature; without it there is nothing to do.

use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCES: &str = "src/kernels/cuda";
/// Devices whose machine code is embedded; newer ones compile the embedded PTX of the last when the kernels are loaded.
const ARCHITECTURES: [&str; 3] = ["80", "89", "90"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed={SOURCES}");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    let out_dir = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    if let Err(message) = compile(&out_dir.join("kernels.fatbin")) {
        println!("cargo::error={message}");
    }
}

fn compile(image: &Path) -> Result<(), String> {
    let nvcc = std::env::var_os("CUDA_HOME").map_or("nvcc".into(), |home| PathBuf::from(home).join("bin/nvcc"));
    let mut command = Command::new(&nvcc);
    command.args(["-fatbin", "-std=c++17", "-O3", "--threads", "2"]);
    for architecture in ARCHITECTURES {
        command.arg(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"));
    }
    if let Some(newest) = ARCHITECTURES.last() {
        command.arg(format!("-gencode=arch=compute_{newest},code=compute_{newest}"));
    }
    command.arg("-o").arg(image).arg(Path::new(SOURCES).join("kernels.cu"));
    let output = command.output().map_err(|error| {
        format!(
            "the cuda feature needs NVIDIA's compiler, but {} does not start: {error}; set CUDA_HOME",
            nvcc.display()
        )
    })?;
    if output.status.success() {
        return Ok(());
    }
    for line in String::from_utf8_lossy(&output.stderr).lines() {
        println!("cargo::warning={line}");
    }
    Err(format!("{} could not compile {SOURCES}/kernels.cu", nvcc.display()))
}
