#!/usr/bin/env bash
# The peer: llama.cpp, built from the source that llama-cpp-python 0.3.36 carries, on the same model with as many threads,
# beside model_bench, one after the other. Prints and keeps both as JSON.
#   bench/e2e/llama_cpp.sh OUT_DIR [THREADS]
# Needs what scripts/install_deps.sh --test installs, and python3 with venv. Builds in OUT_DIR (about 10 minutes on 2 cores, once).
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/../../scripts/lib.sh"
[ $# -ge 1 ] || die "give a directory for build and results"
out=$(mkdir -p -- "$1" && cd -- "$1" && pwd)
threads=${2:-$(nproc)}
source=$out/llama_cpp_python-0.3.36
if [ ! -d "$source" ]; then
  python3 -m venv "$out/venv"
  "$out/venv/bin/pip" download -q --no-deps --no-binary :all: -d "$out" llama-cpp-python==0.3.36
  tar -xzf "$out/llama_cpp_python-0.3.36.tar.gz" -C "$out"
fi
if [ ! -x "$out/llama/bin/llama-bench" ]; then
  # Not -march=native: its AMX kernels crash on some virtual machines. What this CPU has of AVX-512 is asked for by name.
  isa=(-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON)
  ! grep -qw avx512_vnni /proc/cpuinfo || isa+=(-DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON)
  cmake -S "$source/vendor/llama.cpp" -B "$out/llama" -G Ninja -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
    "${isa[@]}" -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DBUILD_SHARED_LIBS=OFF >"$out/llama.cmake.log"
  cmake --build "$out/llama" --target llama-bench -j "$(build_jobs)" >"$out/llama.build.log"
fi
cmake -S "$ROOT" --preset bench -DPREHOC_ENABLE_CUDA=OFF --log-level=WARNING >/dev/null
cmake --build "$ROOT/build/bench" --target model_bench -j "$(build_jobs)" >/dev/null

say "llama.cpp"
"$out/llama/bin/llama-bench" -m "$MODEL_FILE" -t "$threads" -r 3 -p 512 -n 48 -d 0,4096,7168 -o json >"$out/llama_cpp.json"
say "prehoc"
rm -rf -- "${out:?}/store" && mkdir -p "$out/store"
"$ROOT/build/bench/bin/model_bench" --model="$MODEL_FILE" --document="$DOCUMENT_FILE" --dir="$out/store" --threads="$threads" \
  --benchmark_repetitions=3 --benchmark_out="$out/model_bench.json" --benchmark_out_format=json
rm -rf -- "$out/store"
python3 - "$out" <<'PY'
import json, statistics, sys
out = sys.argv[1]
for row in json.load(open(f"{out}/llama_cpp.json")):
    kind = f"prefill {row['n_prompt']}" if row["n_prompt"] else "decode"
    print(f"llama.cpp  {kind:12} depth {row['n_depth']:5}  {statistics.median(row['samples_ts']):8.1f} tok/s")
PY
