"""Statistics for a quantization pass: of the model at hand, on the text that was asked for, computed when first needed.

statistics = CalibratedStatistics(TextSource(directory, manifest, "builtin"), with_hessians=True)
statistics.prepare(context.model)                 before the pass replaces its first projection
QuantizeInt4(options, statistics)(context)        calls statistics(projection)
statistics.record()                               for the manifest
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile.calibration.calibrate import CalibrationSettings, calibrate
from qcompile.calibration.runner import Say
from qcompile.calibration.self_written import SELF, WritingSettings, self_written_texts
from qcompile.calibration.store import Calibration
from qcompile.calibration.text import BUILT_IN, TokenRows, built_in_texts, read_texts, token_rows
from qcompile.errors import QuantError
from qcompile.passes.quantize_projections import Projection, find_projections
from qcompile.quant.scheme import InputStatistics
from qcompile.runtime.manifest import Manifest
from qcompile.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextSource:
    """Where calibration text comes from.

    Attributes:
        directory: The compiled-model directory that is being quantized: its tokenizer reads the text, and with ``self``
            its model writes it.
        manifest: Its manifest, or None for a bare .onnx file.
        source: ``builtin``, ``self``, or the path of a file.
    """

    directory: Path
    manifest: Manifest | None
    source: str | Path = BUILT_IN

    def rows(self, settings: CalibrationSettings, say: Say | None = None, cache: Path | None = None) -> TokenRows:
        """Return the text as rows of tokens.

        Raises:
            QuantError: There is no tokenizer, or the file cannot be used.
            QCompileError: The model cannot write texts of its own.
        """
        if self.manifest is None:
            raise QuantError(
                f"{self.directory}: calibration reads text with the model's tokenizer; give the directory that `qcompile "
                "export` wrote instead of a bare .onnx file"
            )
        if str(self.source) == SELF:
            writing = WritingSettings(num_tokens=settings.num_tokens)
            texts = self_written_texts(self.directory, None, writing, cache=cache, say=say)
        elif str(self.source) == BUILT_IN:
            texts = built_in_texts()
        else:
            texts = read_texts(Path(self.source))
        return token_rows(
            texts,
            Tokenizer(self.directory, self.manifest),
            num_tokens=settings.num_tokens,
            row_length=settings.row_length,
            vocab_size=self.manifest.model.vocab_size,
            context=self.manifest.model.max_position_embeddings,
            source=str(self.source),
        )


class CalibratedStatistics:
    """What a quantization pass asks for the statistics of a projection's inputs.

    Args:
        text: Where the text comes from.
        settings: How to calibrate.
        with_hessians: Whether an algorithm needs second moments (`qcompile.quant.algorithms.NEEDS_HESSIAN`, AWQ).
        cache: Directory of calibrations; by default under qcompile's cache directory.
        say: Called with (what, done, total).
    """

    def __init__(
        self,
        text: TextSource,
        settings: CalibrationSettings | None = None,
        *,
        with_hessians: bool = True,
        cache: Path | None = None,
        say: Say | None = None,
    ) -> None:
        self.text = text
        self.settings = replace(settings or CalibrationSettings(), with_hessians=with_hessians)
        self.cache, self.say = cache, say
        self._calibration: Calibration | None = None

    def prepare(self, model: ir.Model) -> Calibration:
        """Calibrate a float model, as it is now.

        Raises:
            QuantError: The text cannot be used or the model cannot be run on it.
        """
        rows = self.text.rows(self.settings, self.say, self.cache)
        inputs = [p.node.inputs[0] for p in find_projections(model.graph) if not p.is_lookup]
        names = [v.name or "" for v in inputs if v is not None and v.producer() is not None]
        self._calibration = calibrate(model, rows, self.settings, names, cache=self.cache, say=self.say)
        return self._calibration

    def __call__(self, projection: Projection) -> InputStatistics:
        """Return the statistics of a projection's inputs; `prepare` comes first.

        Raises:
            QuantError: They were not gathered.
        """
        value = projection.node.inputs[0]
        if self._calibration is None or value is None:
            raise QuantError(f"{projection.name}: the model has not been calibrated")
        return self._calibration.statistics(value.name or "")

    def record(self) -> dict[str, Any]:
        """Return what the manifest should say of the calibration; empty before `prepare`."""
        return {} if self._calibration is None else self._calibration.record()
