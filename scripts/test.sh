#!/usr/bin/env bash
# Builds and runs every test: as users build, with AddressSanitizer and UBSan, and those with threads under ThreadSanitizer, which clang builds
# so that it checks locks on the way; then fuzzes the readers of foreign bytes for a minute, with every check that UBSan has. Installs what is
# missing and fetches the default model first.
#   scripts/test.sh                  everything
#   scripts/test.sh cpu asan         only these presets (cpu, asan, tsan, fuzz, gpu); gpu is left out where there is no nvcc
#   scripts/test.sh --no-install     leaves the system's packages alone
#   scripts/test.sh --no-fetch       without the default model: tests that need it are skipped, and say so
# Exit code 0 only if all of it passed.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

install=yes fetch=yes presets=()
for argument in "$@"; do
  case $argument in
    cpu | asan | tsan | fuzz | gpu) presets+=("$argument") ;;
    --no-install) install=no ;;
    --no-fetch) fetch=no ;;
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) die "unknown argument $argument; see scripts/test.sh --help" ;;
  esac
done
if [ ${#presets[@]} -eq 0 ]; then
  presets=(cpu asan tsan fuzz)
  # Everything of the CUDA build compiles and links without a GPU; tests that need one say that they were skipped.
  ! command -v nvcc >/dev/null || presets+=(gpu)
fi

cd "$ROOT"
[ "$install" = no ] || scripts/install_deps.sh --test
if [ "$fetch" = yes ]; then
  scripts/fetch_model.sh
  scripts/fetch_document.sh
  export PREHOC_TEST_MODEL=$MODEL_FILE PREHOC_TEST_DOCUMENT=$DOCUMENT_FILE
fi

# What two presets compile alike is compiled once, and so is what an earlier build compiled, wherever that checkout was.
export CCACHE_BASEDIR=${CCACHE_BASEDIR:-$ROOT} CCACHE_NOHASHDIR=1
jobs=$(build_jobs)
failed=()
for preset in "${presets[@]}"; do
  say "preset $preset: building with $jobs jobs"
  started=$SECONDS
  # Configured and built quietly: a failure prints, what goes well need not.
  if ! cmake --preset "$preset" --log-level=WARNING >/dev/null || ! cmake --build --preset "$preset" -j "$jobs"; then
    failed+=("$preset (build)")
    continue
  fi
  say "preset $preset: built in $((SECONDS - started)) s"
  ctest --preset "$preset" -j "$(nproc)" || failed+=("$preset")
  say "preset $preset: done after $((SECONDS - started)) s"
done

[ ${#failed[@]} -eq 0 ] || die "failed: ${failed[*]}"
say "passed: ${presets[*]}"
