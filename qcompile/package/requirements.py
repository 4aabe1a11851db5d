"""What a package needs from pip, pinned so that it disturbs nothing that the judge's image already has.

The image has CANN 8.1, torch 2.5.1 (which wants sympy 1.13.1) and a NumPy below 2, vLLM 0.8.4 with transformers 4.51
(tokenizers 0.21). onnxruntime 1.19.2 is the last one for Python 3.9.
"""

from collections.abc import Sequence

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from qcompile.errors import PackageError

_RUNTIME = ("numpy==1.26.4", "tokenizers==0.21.4", "jinja2==3.1.6", "huggingface_hub<1")
_ONNXRUNTIME = ("onnxruntime==1.19.2", "protobuf==3.20.3", "sympy==1.13.1")


def contest_requirements(kinds: Sequence[str], pins: Sequence[str] = ()) -> list[str]:
    """The requirements of a ladder of these kinds; `pins` (NAME==VERSION) replace or add to them.

    Raises:
        PackageError: A pin is no requirement, or names no version.
    """
    chosen = [*_RUNTIME, *(_ONNXRUNTIME if "onnxruntime" in kinds else ())]
    by_name = {canonicalize_name(Requirement(line).name): line for line in chosen}
    for pin in pins:
        try:
            requirement = Requirement(pin)
        except InvalidRequirement:
            raise PackageError(f"--pin {pin}: not a requirement; write NAME==VERSION") from None
        if not requirement.specifier:
            raise PackageError(f"--pin {pin}: names no version; write {requirement.name}==VERSION")
        by_name[canonicalize_name(requirement.name)] = pin
    return list(by_name.values())
