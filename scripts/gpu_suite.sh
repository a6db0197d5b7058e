#!/usr/bin/env bash
# The GPU tests, on a machine with a GPU that may have neither network nor build tools: binaries travel with what they need.
#   scripts/gpu_suite.sh                    builds the preset gpu and runs everything here
#   scripts/gpu_suite.sh --pack DIR         builds, and fills DIR (made if need be) with binaries, libraries and this script
#   DIR/gpu_suite.sh --run [OUT_DIR]        runs what is in DIR; logs to OUT_DIR (default DIR/out)
#   ... --no-sanitizers, --only-sanitizers  without compute-sanitizer, or with nothing else
# Exit code 0 only if every test ran (none was skipped for want of a device) and passed.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
say() { printf 'gpu_suite: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }
tests=(cuda_base_test cuda_kernels_test cuda_engine_test cuda_transfer_test cuda_pipeline_test)

# Files that must travel: what a plain Debian or Ubuntu has is left out.
pack() {
  local root=$here/.. to=$1 binary
  cd "$root"
  cmake --preset gpu --log-level=WARNING >/dev/null
  cmake --build --preset gpu
  mkdir -p "$to/lib"
  for binary in "${tests[@]}" gpu_bench decode_bench operator_bench transfer_bench prefill_bench prompt_bench prehoc; do
    strip -o "$to/$binary" "build/gpu/bin/$binary"
    ldd "build/gpu/bin/$binary" | awk '$3 ~ /^\// { print $3 }' |
      { grep -v -E '/(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|ld-linux-x86-64|libcuda)\.so' || true; } | xargs -r -I{} cp -uL {} "$to/lib/"
  done
  cp scripts/gpu_suite.sh scripts/gpu_bench.sh bench/gpu/torch_baseline.py "$to/"
  { git describe --always --dirty; } >"$to/commit"
  say "packed $(du -sh "$to" | cut -f1) into $to"
}

run() {
  local out=$1 failed=() name
  mkdir -p "$out"
  export LD_LIBRARY_PATH=$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$out/device.txt"
  if [ "$sanitize" != only ]; then
    for name in "${tests[@]}"; do
      local log=$out/$name.log status=0
      timeout 240 "$here/$name" --gtest_brief=1 >"$log" 2>&1 || status=$?
      tail -n 40 "$log"
      [ "$status" = 0 ] || failed+=("$name (exit $status)")
      ! grep -q 'skipped: no CUDA device' "$log" || failed+=("$name (no device)")
    done
  fi
  if [ "$sanitize" != no ]; then
    for tool in memcheck racecheck initcheck synccheck; do
      local log=$out/$tool.log status=0
      # Long cases are left out: each instruction is watched. racecheck takes minutes where blocks wait for each other; what is left for it
      # still runs every kernel.
      local leave='*Long*:*EverySize*:*BytesOfTheReference*'
      [ "$tool" != racecheck ] || leave+=':*ChoosesAsTheModel*:*GroupsDecide*'
      # synccheck takes the arrivals that attention's copies announce themselves (cp.async.mbarrier.arrive) for too many ("Barrier overflow").
      [ "$tool" != synccheck ] || leave+=':AttendCudaTest.*:*AttendSees*:*RowsReadWithin*:*HostRowsOf*:CudaTableTest.*'
      timeout 300 compute-sanitizer --tool "$tool" --error-exitcode 99 "$here/cuda_kernels_test" --gtest_brief=1 \
        --gtest_filter="-$leave" >"$log" 2>&1 || status=$?
      tail -n 5 "$log"
      [ "$status" = 0 ] || failed+=("$tool (exit $status)")
    done
  fi
  [ ${#failed[@]} -eq 0 ] || die "failed: ${failed[*]}"
  say "passed"
}

mode=here to='' sanitize=yes
while [ $# -gt 0 ]; do
  case $1 in
    --pack) mode=pack to=${2:?--pack needs a directory}; shift ;;
    --run) mode=run; if [ $# -gt 1 ] && [ "${2#--}" = "$2" ]; then to=$2; shift; fi ;;
    --no-sanitizers) sanitize=no ;;
    --only-sanitizers) sanitize=only ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) die "unknown argument $1; see --help" ;;
  esac
  shift
done
case $mode in
  pack) pack "$(mkdir -p "$to" && cd "$to" && pwd)" ;;
  run) run "${to:-$here/out}" ;;
  here)
    to=$(mktemp -d)
    pack "$to"
    here=$to run "$to/out"
    ;;
esac
