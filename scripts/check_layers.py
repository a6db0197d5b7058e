#!/usr/bin/env python3
"""Directories are layers: base <- kernels, selector, transfer <- cache <- integrations ('<-': is included by).

Checks every #include "..." of our own headers in C, C++ and CUDA sources:
  - a layer includes itself and what lies below it, nothing else;
  - the CUDA target of transfer (transfer/cuda_*) includes kernels too;
  - cache sees interfaces of transfer and selector, never a backend;
  - frameworks and the file formats of models stay in integrations/; RocksDB stays in the store that is made of it;
  - tests/ and bench/ may include everything of ours, and nothing of ours includes them;
  - the file that is included exists.

  check_layers.py [ROOT]      prints one line per wrong include; exit code 1 if there are any
  check_layers.py --self-test checks that wrong includes are found
"""
import pathlib
import re
import sys
import tempfile

BELOW = {
    "base": set(),
    "kernels": {"base"},
    "selector": {"base"},
    "transfer": {"base"},
    "cache": {"base", "kernels", "selector", "transfer"},
    "integrations": {"base", "kernels", "selector", "transfer", "cache"},
}
# Targets of a layer that see more than the rest of it.
MORE = {"transfer/cuda_": {"kernels"}}
OPEN = {"tests", "bench"}  # see everything, are seen by nobody but themselves

# What cache may not see of the layers below: the backends behind the seams.
BACKENDS = {"transfer/rocksdb_store.h", "transfer/rocksdb_settings.h", "transfer/store_directory.h",
            "transfer/segment_table.h", "transfer/segment_keys.h", "transfer/direct_file.h", "transfer/cuda_transfer_engine.h"}

# Headers of others, and who may include them.
FOREIGN = [
    (re.compile(r"rocksdb/(?!version\.h)"),  # which version it is, anybody may say
     {"transfer/rocksdb_store.cc", "transfer/rocksdb_settings.h", "transfer/rocksdb_settings.cc", "tests/fakes/killing_env.h", "tests/fakes/unsynced_env.h"}),
    (re.compile(r"(nlohmann/|CLI/|spdlog/|fmt/|cblas|openblas|dnnl|oneapi/)"), {"integrations/", "tests/", "bench/"}),
]

SOURCES = {".h", ".cc", ".cpp", ".inc", ".cu", ".cuh"}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)


def sources(root):
    for layer in sorted(set(BELOW) | OPEN):
        for path in sorted((root / layer).rglob("*")) if (root / layer).is_dir() else []:
            if path.suffix in SOURCES and path.is_file():
                yield path.relative_to(root).as_posix(), path


def wrong_include(root, source, quote, header):
    """Why `source` may not include `header`, or None."""
    layer = source.split("/")[0]
    for pattern, allowed in FOREIGN:
        if pattern.match(header) and not any(source == a or (a.endswith("/") and source.startswith(a)) for a in allowed):
            return f"only {', '.join(sorted(allowed))} may"
    if quote == "<":
        return None
    target = header.split("/")[0]
    if target not in BELOW and target not in OPEN:
        generated = (root / source).parent / header
        return None if generated.exists() else "name it from the root of the repository"
    if not (root / header).exists() and not (root / (header + ".in")).exists():
        return "there is no such file"
    if layer in OPEN:
        return None
    if target in OPEN:
        return "tests and benchmarks are not part of the library"
    below = BELOW[layer].union(*(more for prefix, more in MORE.items() if source.startswith(prefix)))
    if target != layer and target not in below:
        return f"{layer}/ may include {', '.join(sorted(below | {layer}))}"
    if layer == "cache" and header in BACKENDS:
        return "cache sees interfaces of transfer, never a backend"
    return None


def check(root):
    errors = []
    count = 0
    for source, path in sources(root):
        text = path.read_text(encoding="utf-8", errors="replace")
        for match in INCLUDE.finditer(text):
            count += 1
            why = wrong_include(root, source, match.group(1), match.group(2))
            if why:
                line = text.count("\n", 0, match.start(2)) + 1
                errors.append(f"{source}:{line}: includes {match.group(2)}: {why}")
    return errors, count


def self_test():
    cases = [  # (source, include, is it wrong?)
        ("base/a.cc", '"base/b.h"', False),
        ("base/a.cc", '"transfer/t.h"', True),
        ("kernels/a.cc", '"base/b.h"', False),
        ("kernels/a.cc", '"selector/s.h"', True),
        ("selector/a.h", '"transfer/t.h"', True),
        ("transfer/a.cc", '"kernels/k.h"', True),
        ("transfer/cuda_a.cc", '"kernels/k.h"', False),
        ("transfer/cuda_a.cc", '"cache/c.h"', True),
        ("transfer/a.cc", '"cache/c.h"', True),
        ("cache/a.cc", '"transfer/t.h"', False),
        ("cache/a.cc", '"transfer/rocksdb_store.h"', True),
        ("cache/a.cc", '"integrations/i.h"', True),
        ("cache/a.cc", "<rocksdb/db.h>", True),
        ("cache/a.cc", "<vector>", False),
        ("cache/sub/a.cc", '"integrations/i.h"', True),
        ("integrations/cli/a.cc", '"transfer/rocksdb_store.h"', False),
        ("integrations/cli/a.cc", "<nlohmann/json.hpp>", False),
        ("kernels/a.cc", "<cblas.h>", True),
        ("transfer/rocksdb_store.cc", "<rocksdb/db.h>", False),
        ("transfer/a.cc", '"tests/x.h"', True),
        ("transfer/a.cc", '"transfer/missing.h"', True),
        ("tests/x.cc", '"cache/c.h"', False),
        ("base/a.cu", '"cache/c.h"', True),
    ]
    headers = ["base/b.h", "kernels/k.h", "selector/s.h", "transfer/t.h", "transfer/rocksdb_store.h", "cache/c.h",
               "integrations/i.h", "tests/x.h"]
    failed = 0
    for source, include, is_wrong in cases:
        with tempfile.TemporaryDirectory() as directory:
            root = pathlib.Path(directory)
            for name in headers + [source]:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text("")
            (root / source).write_text(f"// a comment\n#  include {include}\n")
            errors, _ = check(root)
            if bool(errors) != is_wrong:
                print(f"self-test: {source} includes {include}: {'not found' if is_wrong else errors}")
                failed += 1
    print(f"self-test: {len(cases)} cases, {failed} failed")
    return failed


def main():
    if sys.argv[1:] == ["--self-test"]:
        return 1 if self_test() else 0
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent.parent).resolve()
    errors, count = check(root)
    for error in errors:
        print(error)
    print(f"{count} includes, {len(errors)} wrong")
    return 1 if errors or count == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
