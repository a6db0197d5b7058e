#!/usr/bin/env bash
# Builds the tests with clang's source-based coverage, runs them, and prints which share of the lines of base, cache, selector
# and transfer they run, and the files that they run least of.
#   scripts/coverage.sh              all tests
#   scripts/coverage.sh -R cache     arguments go to ctest
# build/coverage/lines.txt has every line with how often it ran. Exit code 1 if a test failed or a module is below 90 %.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

case "${1:-}" in
  -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
cd "$ROOT"
build=build/coverage
modules=(base cache selector transfer)
others='/(tests|integrations|kernels|usr)/'

# The tools of the compiler that is used: their file formats change with every release.
version=$(clang++ -dumpversion | cut -d. -f1)
tool() { command -v "$1-$version" || command -v "$1" || die "$1 of clang $version is missing: scripts/install_deps.sh --test"; }
profdata=$(tool llvm-profdata)
cov=$(tool llvm-cov)

cmake --preset coverage --log-level=WARNING >/dev/null
cmake --build --preset coverage -j "$(build_jobs)"
rm -rf "$build/profiles"
# Counters make vector objects what kernels_vector_objects refuses. %m: runs of one program add up in one file.
failed=no
LLVM_PROFILE_FILE="$ROOT/$build/profiles/%m.profraw" ctest --preset coverage -j "$(nproc)" -E kernels_vector_objects "$@" || failed=yes
"$profdata" merge --sparse -o "$build/all.profdata" "$build"/profiles/*.profraw

objects=()
for program in "$build"/bin/*; do
  if [ -x "$program" ]; then objects+=(${objects[0]+-object} "$program"); fi
done
"$cov" show -instr-profile "$build/all.profdata" "${objects[@]}" --ignore-filename-regex="$others" >"$build/lines.txt"
"$cov" export --summary-only -instr-profile "$build/all.profdata" "${objects[@]}" --ignore-filename-regex="$others" >"$build/summary.json"
python3 - "$ROOT" "$build/summary.json" "${modules[@]}" <<'PYTHON' || failed=yes
import json, os, sys

root, path, *modules = sys.argv[1:]
files = []
for file in json.load(open(path))["data"][0]["files"]:
    lines = file["summary"]["lines"]
    name = os.path.relpath(file["filename"], root)
    if name.split("/")[0] in modules and lines["count"] > 0: files.append((name, lines["count"], lines["covered"]))
low = False
print(f"{'module':10} {'files':>6} {'lines':>7} {'run':>7} {'share':>8}")
for module in modules:
    own = [(lines, run) for name, lines, run in files if name.split("/")[0] == module]
    lines, run = (sum(column) for column in zip(*own))
    low |= run < 0.9 * lines
    print(f"{module:10} {len(own):6} {lines:7} {run:7} {100 * run / lines:7.2f}%")
print("\nleast of")
for name, lines, run in sorted(files, key=lambda file: file[2] / file[1])[:15]:
    print(f"{100 * run / lines:7.2f}%  {lines - run:4} of {lines:4} lines not run  {name}")
sys.exit(low)
PYTHON
[ "$failed" = no ] || die "a test failed, or a module is below 90 %"
