#!/usr/bin/env bash
# Builds the parser plugins and installs them where ATC looks. For a machine with CANN; not run here.
#
#   source <toolkit>/set_env.sh
#   bash install.sh                 # into $ASCEND_OPP_PATH/vendors/qcompile, and first in vendors/config.ini
#   bash install.sh --to DIR        # into DIR; then export ASCEND_CUSTOM_OPP_PATH=DIR
#   bash install.sh --remove        # out of $ASCEND_OPP_PATH again
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
VENDOR=qcompile

fail() { echo "install.sh: $*" >&2; exit 1; }

target="" remove=0
while [ $# -gt 0 ]; do
  case "$1" in
    --to)
      case "${2:-}" in
        "") fail "--to wants a folder" ;;
        -*) fail "--to wants a folder, not '$2'; for one of that name write ./$2" ;;
        /*) target="$2" ;;
        *) target="$caller/$2" ;;
      esac
      shift 2 ;;
    --remove) remove=1; shift ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$(basename "${BASH_SOURCE[0]}")"; exit 0 ;;
    *) fail "unknown option $1; --help lists them" ;;
  esac
done

vendors="${ASCEND_OPP_PATH:-}/vendors"
if [ -z "$target" ]; then
  [ -n "${ASCEND_OPP_PATH:-}" ] || fail "ASCEND_OPP_PATH is not set: source <toolkit>/set_env.sh, or give --to DIR"
  [ -d "$ASCEND_OPP_PATH" ] || fail "$ASCEND_OPP_PATH is no folder"
fi

# Writes config.ini anew with the given list behind load_priority=, in one step.
write_priority() {
  local config="$vendors/config.ini" list="$1" temporary
  temporary=$(mktemp "$vendors/.config.XXXXXX")
  { [ ! -f "$config" ] || grep -v '^load_priority=' "$config" || true; [ -z "$list" ] || echo "load_priority=$list"; } >"$temporary"
  chmod 644 "$temporary"
  mv "$temporary" "$config"
}

others() {
  [ ! -f "$vendors/config.ini" ] || sed -n 's/^load_priority=//p' "$vendors/config.ini" | tr ',' '\n' | grep -vx "$VENDOR" | paste -sd, - || true
}

if [ "$remove" = 1 ]; then
  [ -z "$target" ] || fail "--remove takes no --to: remove the folder"
  [ -d "$vendors/$VENDOR" ] || grep -qsE "^load_priority=(.*,)?$VENDOR(,|$)" "$vendors/config.ini" ||
    fail "$vendors/$VENDOR: there is nothing to remove"
  rm -rf "${vendors:?}/$VENDOR"
  [ ! -f "$vendors/config.ini" ] || write_priority "$(others)"
  echo "removed $vendors/$VENDOR"
  exit 0
fi

command -v cmake >/dev/null || fail "cmake is not on PATH; version 3.16 or newer is wanted"
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cmake -S . -B "$build" -DCMAKE_BUILD_TYPE=Release ${CMAKE_ARGS:-}
cmake --build "$build"
library="$build/libqcompile_onnx_plugin.so"
for op in NPURmsNormEpsilon NPUSwiGlu NPUApplyRotaryPosEmb NPUFusedInferAttentionScore; do
  grep -q "ai.onnx::16::$op" "$library" || fail "$library does not register $op"
done

if [ -n "$target" ]; then
  cmake --install "$build" --prefix "$target"
  echo "installed; before atc: export ASCEND_CUSTOM_OPP_PATH=$(cd "$target" && pwd)\${ASCEND_CUSTOM_OPP_PATH:+:\$ASCEND_CUSTOM_OPP_PATH}"
else
  mkdir -p "$vendors"
  cmake --install "$build" --prefix "$vendors/$VENDOR"
  rest=$(others)
  write_priority "$VENDOR${rest:+,$rest}"
  echo "installed in $vendors/$VENDOR; \`qcompile doctor\` lists what is registered now"
fi
