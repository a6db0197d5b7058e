#!/usr/bin/env bash
# Writes the default document, the King James Bible as Debian's bible-kjv prints it (4.4 MB), to
# $XDG_CACHE_HOME/prehoc/documents (~/.cache/prehoc/documents); in place only when whole.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
[ $# -eq 0 ] || die "takes no arguments"

is_whole() {
  head -n 1 -- "$1" | grep -q '^Ge1:1 In the beginning ' && tail -n 5 -- "$1" | grep -q '^Rev22:21 ' &&
    [ "$(wc -l <"$1")" -ge 31102 ]
}

if [ -f "$DOCUMENT_FILE" ] && is_whole "$DOCUMENT_FILE"; then
  say "$DOCUMENT_FILE is there"
  exit 0
fi
command -v bible >/dev/null || die "the command bible is missing; install it with scripts/install_deps.sh"
mkdir -p -- "$(dirname -- "$DOCUMENT_FILE")"
work=$(mktemp -- "$(dirname -- "$DOCUMENT_FILE")/.fetch.XXXXXX")
trap 'rm -f -- "$work"' EXIT
# COLUMNS would wrap lines, and another text has other tokens.
env -u COLUMNS bible -f gen1:1-rev22:21 </dev/null >"$work" || die "bible failed"
is_whole "$work" || die "bible printed something else than Genesis 1:1 to Revelation 22:21; is bible-kjv-text installed?"
chmod 644 "$work"
mv -f -- "$work" "$DOCUMENT_FILE"
say "$DOCUMENT_FILE is there"
