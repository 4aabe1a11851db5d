"""A small tree that stands for a machine with CANN: toolkit, operator package, driver, tools as shell scripts."""

from __future__ import annotations

import os
from pathlib import Path

_ATC = """#!/bin/sh
# Stands for atc: writes what it was asked, then does what $FAKE_ATC says.
out=; soc=; model=
for word in "$@"; do
  case "$word" in
    --output=*) out=${word#--output=} ;;
    --soc_version=*) soc=${word#--soc_version=} ;;
    --model=*) model=${word#--model=} ;;
  esac
done
printf '%s\\n' "$*" >> "$FAKE_ATC_CALLS"
echo "env TE_PARALLEL_COMPILER=$TE_PARALLEL_COMPILER MAX_COMPILE_CORE_NUMBER=$MAX_COMPILE_CORE_NUMBER" >> "$FAKE_ATC_CALLS"
[ -f "$model" ] || { echo "E10410: file $model does not exist"; exit 1; }
echo "ATC start working now, please wait for a moment."
case "$FAKE_ATC" in
  fail:*) [ "${FAKE_ATC#fail:}" = all ] || case "$out" in *"${FAKE_ATC#fail:}"*) ;; *) FAKE_ATC=ok ;; esac ;;
esac
case "$FAKE_ATC" in
  fail:*) cat "$FAKE_ATC_LOG"; echo "ATC run failed, Please check the detail log"; exit 255 ;;
  killed) kill -9 $$ ;;
  silent) exit 0 ;;
  noom) echo x > "$out.om"; echo "ATC run success, welcome to the next use."; exit 0 ;;
  nofile) echo "ATC run success, welcome to the next use."; exit 0 ;;
  slow) sleep 30 ;;
  weights) mkdir -p "$(dirname "$out")/weight"; printf 'same' > "$(dirname "$out")/weight/weight_ab12" ;;
esac
name=$out.om
[ "$FAKE_ATC" = linux ] && name=${out}_linux_aarch64.om
printf 'IMOD %s %s' "$soc" "$(basename "$out")" > "$name"
echo "ATC run success, welcome to the next use."
"""
_SMI = """#!/bin/sh
cat <<'EOF'
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.rc2                 Version: 24.1.rc2                                             |
+===========================+===============+====================================================+
| 0     910B4               | OK            | 88.4        42                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3421 / 32768         |
+===========================+===============+====================================================+
EOF
"""
PYTHON_WITH_ALL = "#!/bin/sh\necho\n"
PYTHON_WITHOUT = "#!/bin/sh\necho decorator absl\n"


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def toolkit(system: Path, version: str = "8.1.RC1", layout: str = "ascend-toolkit/latest") -> Path:
    """A toolkit with operator package, parsers and kernels, as its installer leaves it."""
    home = system / "usr/local/Ascend" / layout
    script(home / "bin/atc", _ATC)
    (home / "aarch64-linux/devlib").mkdir(parents=True)
    (home / "aarch64-linux/ascend_toolkit_install.info").write_text(
        f"package_name=Ascend-cann-toolkit\nversion={version}\n"
    )
    script(
        home.parent / "set_env.sh" if layout.endswith("latest") else home / "set_env.sh", "export ASCEND_OPP_PATH=x\n"
    )
    onnx = home / "opp/built-in/framework/onnx"
    onnx.mkdir(parents=True)
    names = ["ai.onnx::11::NPURmsNorm", "npu::1::NPURmsNorm", "ai.onnx::16::QuantBatchMatMul", "ai.onnx::16::Add"]
    (onnx / "libops_all_onnx_plugin.so").write_bytes(b"\x7fELF\0" + b"\0".join(n.encode() for n in names) + b"\0" * 64)
    (home / "opp/built-in/op_impl/ai_core/tbe/config/ascend910b").mkdir(parents=True)
    (home / "python/site-packages/acl").mkdir(parents=True)
    return home


def sourced(home: Path, tools: Path, *, python: str = PYTHON_WITH_ALL, smi: bool = False) -> dict[str, str]:
    """The environment after `source set_env.sh`."""
    script(tools / "python3", python)
    if smi:
        script(tools / "npu-smi", _SMI)
    return {
        "PATH": os.pathsep.join([str(home / "bin"), str(tools), "/usr/bin", "/bin"]),
        "ASCEND_TOOLKIT_HOME": str(home),
        "ASCEND_OPP_PATH": str(home / "opp"),
        "PYTHONPATH": str(home / "python/site-packages"),
        "HOME": str(tools),
    }
