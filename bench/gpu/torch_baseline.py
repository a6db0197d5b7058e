#!/usr/bin/env python3
"""What dense decode attention costs in PyTorch on this machine: SDPA with the flash and the cuDNN backend.

    torch_baseline.py OUT.json [--commit ID]

The operator grid and long contexts at batch 1, as gpu_bench measures ours; as many copies of K and V as gpu_bench has layers, in one CUDA graph; median of 21 replays between events.
"""
import json
import statistics
import subprocess
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

REPEATS = 21


def measure(backend, batch, kv_heads, group, d, n):
    layer_bytes = batch * kv_heads * n * 2 * d * 2
    layers = max(2, min(32, int(1.2e9 / layer_bytes)))
    heads = kv_heads * group
    kv = [[torch.randn(batch, kv_heads, n, d, device="cuda", dtype=torch.float16) for _ in range(2)] for _ in range(layers)]
    q = torch.randn(batch, heads, 1, d, device="cuda", dtype=torch.float16)

    def run():
        for k, v in kv:
            torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=group > 1)

    with sdpa_kernel(backend):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        times = []
        for _ in range(REPEATS + 3):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / layers)
    us = statistics.median(times[3:])
    return {"us": us, "gb_per_s": layer_bytes / us / 1e3, "layers": layers}


def driver():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main():
    out = sys.argv[1]
    commit = sys.argv[sys.argv.index("--commit") + 1] if "--commit" in sys.argv else "unknown"
    rows = []
    shapes = [(b, 32, 1, 128, n) for b in (8, 16) for n in (1024, 2048, 4096)]
    shapes += [(1, 8, 4, 128, n) for n in (8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576)]
    for shape in shapes:
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
            row = {"name": name, "shape": dict(zip(("batch", "kv_heads", "group", "head_dim", "n"), shape))}
            try:
                row.update(measure(backend, *shape))
            except RuntimeError as error:  # a backend that does not take the shape is a result, too
                row["error"] = str(error).splitlines()[0]
            torch.cuda.empty_cache()
            rows.append(row)
            print(row, flush=True)
    head = {"bench": "PyTorch SDPA", "command": "torch_baseline.py", "device": torch.cuda.get_device_name(), "driver": driver(),
            "commit": commit, "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    with open(out, "w") as file:
        lines = ["%s: %s" % (json.dumps(key), json.dumps(value)) for key, value in head.items()]
        lines.append('"results": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]")
        file.write("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
