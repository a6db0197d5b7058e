#!/usr/bin/env bash
# The main job, from nothing: installs what is missing, builds, fetches model and document, and asks "Who killed Abel?"
# of the first 6,000 tokens of the King James text. 138 MB of KV against 48 MiB of device and 64 MiB of host memory, so
# that device, host and disk all hold rows that are used. Then asks again: the second run restores from disk.
#   scripts/demo.sh           keeps the disk tier of an earlier run
#   scripts/demo.sh --fresh   deletes it first
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

store=$CACHE_DIR/demo-store
for argument in "$@"; do
  case $argument in
    --fresh) rm -rf -- "$store" ;;
    -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) die "unknown argument $argument; see scripts/demo.sh --help" ;;
  esac
done

cd "$ROOT"
scripts/install_deps.sh
jobs=$(build_jobs)
say "building with $jobs jobs"
cmake --preset release --log-level=WARNING >/dev/null
cmake --build --preset release -j "$jobs" --target prehoc
scripts/fetch_model.sh
scripts/fetch_document.sh

prehoc=$ROOT/build/release/bin/prehoc
budgets=(--device-budget 48MiB --host-budget 64MiB --store "$store" --store-budget 1GiB)
run() {
  echo
  echo "\$ prehoc $*"
  "$prehoc" "$@"
}
run answer "${budgets[@]}" --audit-every 16 --compare dense
echo
say "once more: the KV of the document now comes from disk"
run answer "${budgets[@]}" --audit-every 16
