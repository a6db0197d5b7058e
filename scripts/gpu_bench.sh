#!/usr/bin/env bash
# The GPU benchmarks, on a machine with a GPU: JSON with device, driver and commit. Packed by scripts/gpu_suite.sh --pack DIR.
#   DIR/gpu_bench.sh OUT_DIR [arguments of gpu_bench]     gpu.json, and torch.json where PyTorch is present
#   DIR/gpu_bench.sh OUT_DIR --no-torch ...               ours alone
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
[ $# -gt 0 ] || { sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 1; }
out=$1
shift
torch=yes
if [ "${1:-}" = --no-torch ]; then torch=no; shift; fi
mkdir -p "$out"
commit=$(cat "$here/commit")
export LD_LIBRARY_PATH=$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader | tee "$out/device.txt"
"$here/gpu_bench" --out="$out/gpu.json" --commit="$commit" "$@"
if [ "$torch" = yes ] && python3 -c 'import torch' 2>/dev/null; then
  python3 "$here/torch_baseline.py" "$out/torch.json" --commit "$commit"
fi
