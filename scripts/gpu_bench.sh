#!/usr/bin/env bash
# The GPU benchmarks, on a machine with a GPU: a JSON file each, with command, device, driver and commit. Packed by
# scripts/gpu_suite.sh --pack DIR.
#   DIR/gpu_bench.sh OUT_DIR                       all of them, about 10 minutes; 72 GiB of host memory, 60 GiB on the device
#   DIR/gpu_bench.sh OUT_DIR --only=decode-128k,operator
#   names: kernels torch-sdpa operator decode-128k decode-batch decode-long decode-long-int8 transfer prefill prefill-half
#          prompt prompt-half
# Each has a time limit of its own and does not stop the others. Exit code 0 only if all did what they were asked to: an answer that is
# wrong or a case over its memory budget is a failure. torch-sdpa is left out, and says so, where PyTorch is not installed.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
usage() { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 1; }
[ $# -gt 0 ] && [ "${1#-}" = "$1" ] || usage
out=$1
shift
only=''
for argument in "$@"; do
  case $argument in
    --only=*) only=",${argument#--only=}," ;;
    *) usage ;;
  esac
done
mkdir -p "$out"
commit=$(cat "$here/commit")
export LD_LIBRARY_PATH=$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader | tee "$out/device.txt"

failed=()
# bench NAME SECONDS COMMAND...: JSON to NAME.json, text to NAME.txt.
bench() {
  local name=$1 limit=$2 status=0 start=$SECONDS
  shift 2
  [ -z "$only" ] || [[ $only = *,$name,* ]] || return 0
  timeout "$limit" "$@" >"$out/$name.txt" 2>&1 || status=$?
  cat "$out/$name.txt"
  printf 'gpu_bench: %s: exit %s after %s s\n' "$name" "$status" $((SECONDS - start)) >&2
  [ "$status" = 0 ] || failed+=("$name (exit $status)")
}
ours() {
  local name=$1 limit=$2 program=$3
  shift 3
  bench "$name" "$limit" "$here/$program" --out="$out/$name.json" --commit="$commit" "$@"
}
cases() { local IFS=,; printf '%s' "$*"; }

ours kernels 150 gpu_bench
ours operator 120 operator_bench
ours decode-128k 90 decode_bench --steps=64 --cases="$(cases weights dense/m16 {scan4,gate4@0.8,scan2,gate2@0.8}/m4)"
# Two clocks within the budgets of the targets, K and V of 32 to 128 GiB beside them; dense at 128K is the most that fits 16 GiB.
ours decode-batch 150 decode_bench --steps=64 --host-pool-gib=32 --cases="$(cases weights/b4 weights/b8 dense/m16 \
  {scan4,gate4@0.8}/b4/n130048/f4/m14 {scan4,gate4@0.8}/b8/n32768/f3/m13 {scan2,gate2@0.8}/b8/n131072/f2/m16)"
ours decode-long 120 decode_bench --steps=64 --host-pool-gib=32 \
  --cases="$(cases weights {scan4,gate4@0.8}/n524288/m12 {scan2,gate2@0.8}/n1048576/f3/m12)"
ours decode-long-int8 150 decode_bench --steps=64 --host-pool-gib=32 --rows=int8 \
  --cases="$(cases weights {scan2,gate2@0.8}/n1048576/f3/m12)"
ours transfer 150 transfer_bench --pool-gib=64
ours prefill 120 prefill_bench
ours prefill-half 60 prefill_bench --only=parts --precision=half
ours prompt 240 prompt_bench --prefill=131072 --runs=off,tc
ours prompt-half 180 prompt_bench --prefill=131072 --runs=off,tc --precision=half
if python3 -c 'import torch' 2>/dev/null; then
  bench torch-sdpa 120 python3 "$here/torch_baseline.py" "$out/torch-sdpa.json" --commit "$commit"
elif [ -z "$only" ] || [[ $only = *,torch-sdpa,* ]]; then
  printf 'gpu_bench: torch-sdpa: left out, PyTorch is not installed\n' >&2
fi
[ ${#failed[@]} -eq 0 ] || { printf 'gpu_bench: failed: %s\n' "${failed[*]}" >&2; exit 1; }
