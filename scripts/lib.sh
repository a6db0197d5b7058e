# shellcheck shell=bash disable=SC2034
# What the scripts share; sourced, with `set -euo pipefail` already on. Sets ROOT and CACHE_DIR.
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '%s: %s\n' "$(basename -- "$0")" "$*" >&2; }
die() { say "error: $*"; exit 1; }

# A bare machine may have no HOME.
if [ -z "${HOME:-}" ]; then
  HOME=$(getent passwd "$(id -u)" | cut -d: -f6)
  export HOME
fi
case "${XDG_CACHE_HOME:-}" in
  /*) CACHE_DIR=$XDG_CACHE_HOME/prehoc ;;
  *) CACHE_DIR=$HOME/.cache/prehoc ;;  # the XDG specification has relative paths ignored
esac

MODEL_FILE=$CACHE_DIR/models/SmolLM2-135M-Instruct.Q4_1.gguf
DOCUMENT_FILE=$CACHE_DIR/documents/king-james.txt

# Jobs for a build: one per CPU, but not more than the memory carries at 1.5 GiB each.
build_jobs() {
  local cpus memory
  cpus=$(nproc)
  memory=$(awk '/^MemAvailable:/ { print int($2 / 1572864) }' /proc/meminfo)
  [ "$memory" -ge 1 ] || memory=1
  echo $((cpus < memory ? cpus : memory))
}
