#!/usr/bin/env bash
# Installs the Debian packages that building Prehoc takes, as far as they are missing. Debian 12 and Ubuntu 24.04.
#   scripts/install_deps.sh          what the demo takes
#   scripts/install_deps.sh --test   and what the tests take
# As root, or with sudo. Can be run again; does nothing where nothing is missing.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

packages=(
  g++ cmake ninja-build ccache ca-certificates python3 python3-pip
  librocksdb-dev libxxhash-dev libssl-dev nlohmann-json3-dev libcli11-dev libfmt-dev bible-kjv
)
for argument in "$@"; do
  case $argument in
    --test)
      packages+=(libgtest-dev libbenchmark-dev clang libclang-rt-dev llvm)
      # Ubuntu's is a snap, which a container cannot run; the tests that want a browser say so and are skipped.
      if grep -q '^ID=debian$' /etc/os-release; then packages+=(chromium fonts-dejavu-core); fi
      ;;
    *) die "unknown argument $argument; give --test or nothing" ;;
  esac
done

missing() {
  local package
  for package in "${packages[@]}"; do
    [ "$(dpkg-query -W -f='${db:Status-Abbrev}' "$package" 2>/dev/null)" = "ii " ] || echo "$package"
  done
}

command -v apt-get >/dev/null || die "apt-get is missing: Debian 12 or Ubuntu 24.04 is needed; on other systems install: ${packages[*]}"
mapfile -t wanted < <(missing)
if [ ${#wanted[@]} -eq 0 ]; then
  say "all ${#packages[@]} packages are installed"
  exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || die "run as root, or install sudo, or ask for: apt-get install ${wanted[*]}"
  as_root=(sudo)
fi
apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -q "$@"; }

say "installing ${wanted[*]}"
# An installation that was cut off earlier is finished first; apt-get refuses to work beside one.
if [ -n "$(dpkg --audit)" ]; then
  say "finishing an earlier installation that was cut off"
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive dpkg --configure -a
fi
apt update || die "apt-get update failed; check the network and /etc/apt/sources.list, then run this again"
apt install -y --no-install-recommends "${wanted[@]}" || die "apt-get install failed; run this again when its message above is dealt with"

mapfile -t wanted < <(missing)
[ ${#wanted[@]} -eq 0 ] || die "still not installed: ${wanted[*]}"
say "all ${#packages[@]} packages are installed"
