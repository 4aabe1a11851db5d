#!/usr/bin/env bash
# Compiles the graphs of this folder with CANN's ATC, for @SOC@. Made by qcompile.
#
#   bash build_om.sh
#
# Finished graphs are kept: after an interruption, run it again. Logs: atc_build/NAME/atc.log.
set -uo pipefail
host_cpu=@CPU@  # where the .om files will run
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1

if ! command -v atc >/dev/null 2>&1; then
  for env in "${ASCEND_TOOLKIT_HOME:-/nonexistent}"/set_env.sh "${ASCEND_TOOLKIT_HOME:-/nonexistent}"/../set_env.sh \
      /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/cann/set_env.sh \
      "$HOME"/Ascend/ascend-toolkit/set_env.sh "$HOME"/Ascend/cann/set_env.sh; do
    # shellcheck disable=SC1090
    if [ -f "$env" ]; then echo "source $env"; set +u; source "$env"; set -u; break; fi
  done
fi
if ! command -v atc >/dev/null 2>&1; then
  echo "atc is not on PATH: install the CANN toolkit, or source its set_env.sh first" >&2
  exit 3
fi
if [ ! -d /usr/local/Ascend/driver/lib64 ] && [ -n "${ASCEND_TOOLKIT_HOME:-}" ]; then
  stubs="$ASCEND_TOOLKIT_HOME/$(uname -m)-linux/devlib"
  if [ -d "$stubs" ]; then export LD_LIBRARY_PATH="$stubs:${LD_LIBRARY_PATH:-}"; fi
fi
# One kernel compiler per 2 GiB of free memory, at most one per CPU; a job of this size wants about @MEMORY@ MiB (estimate).
free_mib=$(awk '/MemAvailable/ {print int($2 / 1024)}' /proc/meminfo 2>/dev/null || echo 8192)
workers=$(( (free_mib - @MEMORY@) / 2048 ))
cpus=$(nproc 2>/dev/null || echo 4)
if [ "$workers" -gt "$cpus" ]; then workers=$cpus; fi
if [ "$workers" -gt 32 ]; then workers=32; fi
if [ "$workers" -lt 1 ]; then workers=1; fi
export TE_PARALLEL_COMPILER="${TE_PARALLEL_COMPILER:-$workers}" MAX_COMPILE_CORE_NUMBER="${MAX_COMPILE_CORE_NUMBER:-$workers}"

build() {  # NAME KEY ARGUMENTS...
  local name=$1 key=$2 status
  shift 2
  if python3 finish_manifest.py "done" "$name" "$key"; then echo "$name: finished before, kept"; return; fi
  rm -rf "atc_build/$name"
  mkdir -p "atc_build/$name" || exit 1
  echo "$name: atc $*"
  atc "$@" >"atc_build/$name/atc.log" 2>&1
  status=$?
  if [ "$status" -ne 0 ] || ! grep -q "ATC run success" "atc_build/$name/atc.log"; then
    rm -f "atc_build/$name/"*.om
    tail -n 20 "atc_build/$name/atc.log" >&2
    if [ "$status" -eq 137 ]; then
      echo "$name: killed, most likely for memory: run it with TE_PARALLEL_COMPILER=1 MAX_COMPILE_CORE_NUMBER=1" >&2
    fi
    echo "$name: ATC failed with exit code $status; log: atc_build/$name/atc.log" >&2
    exit 1
  fi
  python3 finish_manifest.py collect "$name" "$key" || exit 1
}

@JOBS@
python3 finish_manifest.py soc_version=@SOC@ host_cpu="$host_cpu"
