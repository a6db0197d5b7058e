#!/usr/bin/env bash
# Opens a report (integrations/cli/fidelity_report.h) in headless chromium and fails if the page does.
#   scripts/check_report.sh [--plots N] [--dark] FILE.html [SCREENSHOT.png]
# Exit code 1, saying what: a message on the console, an error that the page shows, NaN and the like, a plot without marks, fewer than
# N plots (1 if not given). 77 where chromium is not installed: nothing was checked.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

plots=1
flags=(--headless=new --no-sandbox --disable-gpu --no-first-run --virtual-time-budget=5000 --enable-logging=stderr
       --window-size=1400,2600)
while [ $# -gt 0 ]; do
  case $1 in
    --plots) plots=${2:?--plots takes a number}; shift 2 ;;
    --dark) flags+=(--blink-settings=preferredColorScheme=0); shift ;;
    -*) die "unknown argument $1" ;;
    *) break ;;
  esac
done
[ $# -eq 1 ] || [ $# -eq 2 ] || die "give FILE.html and, for a picture, SCREENSHOT.png"
[ -f "$1" ] || die "there is no file $1"
page=file://$(realpath -- "$1")
picture=${2:-}

for browser in chromium chromium-browser google-chrome none; do
  command -v "$browser" >/dev/null && break
done
if [ "$browser" = none ]; then
  say "skipped: chromium is not installed"
  exit 77
fi

work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
visit() {  # visit OUTPUT FLAG...: the log goes to $work/log
  local output=$1
  shift
  timeout 100 "$browser" "${flags[@]}" --user-data-dir="$work/profile" "$@" "$page" >"$output" 2>"$work/log" ||
    { tail -n 20 "$work/log" >&2; die "$browser failed with exit code $?"; }
}
visit "$work/dom" --dump-dom
[ -s "$work/dom" ] || die "$browser returned no document"

wrong=0
fault() { say "$*"; wrong=1; }
if grep -a 'CONSOLE' "$work/log" >"$work/console"; then
  head -n 10 "$work/console" >&2
  fault "the page wrote $(wc -l <"$work/console") lines to the console"
fi
if shown=$(grep -a -o '<[a-z]* id="error"[^>]*>[^<]*' "$work/dom"); then
  fault "the page shows an error: ${shown#*>}"
fi
if nonsense=$(grep -a -o -E '(="[^"]*|>[^<]*)(NaN|\[object |undefined)[^"<]{0,40}' "$work/dom" | grep -a -v -E 'typeof|===' | head -n 3) && [ -n "$nonsense" ]; then
  fault "the page holds no number where one belongs: $nonsense"
fi
# One line per drawn plot: its id and how many marks it has.
awk 'BEGIN { RS = "<svg " }
     NR > 1 && match($0, /^[^>]*class="plot"[^>]*>/) {
       id = substr($0, 1, RLENGTH); sub(/.* id="|^id="/, "", id); sub(/".*/, "", id)
       body = substr($0, 1, index($0, "</svg>")); print id, gsub(/class="mark"/, "", body)
     }' "$work/dom" >"$work/plots"
while read -r id marks; do
  [ "$marks" -gt 0 ] || fault "the plot $id has no marks"
done <"$work/plots"
drawn=$(wc -l <"$work/plots")
[ "$drawn" -ge "$plots" ] || fault "$drawn plots are drawn, not $plots: $(cut -d' ' -f1 "$work/plots" | tr '\n' ' ')"

if [ -n "$picture" ]; then
  visit /dev/null --screenshot="$(realpath -m -- "$picture")"
  [ -s "$picture" ] || fault "no picture was taken"
fi
[ "$wrong" -eq 0 ] || exit 1
say "$1: $drawn plots, $(awk '{ n += $2 } END { print n + 0 }' "$work/plots") marks, no error"
