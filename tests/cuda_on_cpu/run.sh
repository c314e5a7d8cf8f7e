#!/usr/bin/env bash
# Runs the CUDA build of the program where there is no GPU: its own kernels, its own calls of the driver and of cuBLAS, all
# of it on the CPU (driver.cpp, blas.cpp). Nothing about speed can be learnt from it.
#
# Usage: run.sh build DIR BINARY   makes the stand-ins for the libraries that BINARY needs, in DIR
#        run.sh DIR COMMAND...     runs COMMAND with them
#        run.sh test DIR BINARY DTYPE [FILTER...]
#                                  the command line's tests (those of the default build) with BINARY on the device
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if [ "${1:-}" = test ]; then
  dir=$(realpath "${2:?which folder}") binary=$(realpath "${3:?which binary}") dtype=${4:?which dtype}
  shift 4
  cat > "$dir/program-$dtype" <<PROGRAM
#!/bin/sh
case "\$1" in classify|tag|token-classify|generate|score|embed) ;; *) exec env LD_LIBRARY_PATH="$dir" "$binary" "\$@" ;; esac
MISTRAL_BATCH_DEVICE=cuda:0 MISTRAL_BATCH_DTYPE=$dtype LD_LIBRARY_PATH="$dir" exec "$binary" "\$@"
PROGRAM
  chmod +x "$dir/program-$dtype"
  # Scores and sums of log-probabilities at the dtype's precision; f32 as on the CPU.
  case $dtype in f32) tolerance=1e-4 ;; f16) tolerance=1e-2 ;; *) tolerance=6e-2 ;; esac
  cd "$here/../.."
  TEST_PROGRAM="$dir/program-$dtype" TEST_TOLERANCE=$tolerance exec cargo test --release --test cli -- "$@"
fi
if [ "${1:-}" != build ]; then
  dir=$(realpath "${1:?usage: run.sh build DIR BINARY | run.sh DIR COMMAND...}")
  shift
  LD_LIBRARY_PATH=$dir exec "$@"
fi
dir=$(realpath -m "${2:?which folder}")
binary=${3:?which binary}
mkdir -p "$dir"
cxx=${CXX:-c++}
objects=()
for source in cuda_on_cpu kernels driver blas; do
  "$cxx" -std=c++17 -O2 -g1 -fPIC -Wall -Wno-unknown-pragmas -I "$here" -c "$here/$source.cpp" -o "$dir/$source.o"
  objects+=("$dir/$source.o")
done
# What the binary imports and nothing here defines: to call it ends the program with its name.
nm -D --undefined-only "$binary" | awk '{ sub(/@.*/, "", $2); print $2 }' | grep -E '^(cu[A-Z]|cublas|curand|nvrtc|(__)?cuda[A-Z])' | sort -u > "$dir/imported"
nm -g --defined-only "${objects[@]}" | awk 'NF == 3 { print $3 }' | sort -u > "$dir/defined"
{
  echo 'namespace cuda_on_cpu { [[noreturn]] void unknown(const char* name); }'
  comm -23 "$dir/imported" "$dir/defined" | sed 's/.*/extern "C" void &() { cuda_on_cpu::unknown("&"); }/'
} > "$dir/unknown.cpp"
# All in one library; the others by name only, as the binary asks for them.
"$cxx" -std=c++17 -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$dir/libcuda.so.1" "${objects[@]}" "$dir/unknown.cpp"
: > "$dir/empty.cpp"
readelf -d "$binary" | sed -n 's/.*(NEEDED).*\[\(lib\(cu[a-zA-Z]*\|nvrtc\)\.so[.0-9]*\)\]/\1/p' | while read -r library; do
  if [ "$library" != libcuda.so.1 ]; then
    echo "$library {};" > "$dir/versions" # the name that NVIDIA gives its symbols' version
    "$cxx" -shared -fPIC -Wl,-soname,"$library" -Wl,--version-script="$dir/versions" -o "$dir/$library" "$dir/empty.cpp" "$dir/libcuda.so.1"
  fi
done
echo "$(wc -l < "$dir/imported") functions imported, $(comm -23 "$dir/imported" "$dir/defined" | wc -l) of them only by name"
