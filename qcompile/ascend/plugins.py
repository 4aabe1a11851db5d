"""Parser plugins: fused kernels of CANN that its own ONNX parsers cannot reach, reached by libraries from kernels/plugins.

A plugin is built and installed on a machine with CANN; it was not built or run here. Its ONNX operators and what their
kernels take are in `plugin_operators.toml`; the C++ sources register the same names (a test compares them).
"""

from __future__ import annotations

from qcompile.errors import UnsupportedOpError

# Name on the command line -> its ONNX operator, in the default domain.
PLUGINS = {
    "rms-norm": "NPURmsNormEpsilon",
    "swiglu": "NPUSwiGlu",
    "rotary": "NPUApplyRotaryPosEmb",
    "attention": "NPUFusedInferAttentionScore",
}
# Of a lowered graph, in its metadata: the plugins that ATC needs for it, separated by commas.
METADATA_KEY = "qcompile.plugins"
REMARK = "needs the parser plugins {} of kernels/plugins where ATC runs; they were not built or run here"


def plugins_named_in(text: str) -> frozenset[str]:
    """Read the metadata of a graph; what is no plugin is left out, and the check then tells of its operator."""
    return frozenset(name for name in text.split(",") if name in PLUGINS)


def parse_plugins(text: str) -> frozenset[str]:
    """Read `rms-norm,swiglu`, or `all`, alone or beside others; an empty text means none.

    Raises:
        UnsupportedOpError: There is no such plugin, or the text has commas only.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    wanted = f"wanted all, or some of {', '.join(PLUGINS)}"
    if text.strip() and not names:
        raise UnsupportedOpError(f"--plugins {text}: names no plugin; {wanted}")
    for name in names:
        if name not in PLUGINS and name != "all":
            raise UnsupportedOpError(f"--plugins {name}: there is no such plugin; {wanted}")
    return frozenset(PLUGINS if "all" in names else names)
