"""Where calibration text comes from: the built-in set, a file, or the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qcompile.calibration.calibrate import CalibrationSettings
from qcompile.calibration.runner import Say
from qcompile.calibration.self_written import SELF, WritingSettings, self_written_texts
from qcompile.calibration.text import BUILT_IN, TokenRows, built_in_texts, read_texts, token_rows
from qcompile.errors import QuantError
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

    def check(self) -> None:
        """Read the file, if it is one, so that a bad one is refused before any work.

        Raises:
            QuantError: It cannot be used.
        """
        if not str(self.source):
            raise QuantError(f"--calibration is empty; name a file, {BUILT_IN} or {SELF}")
        if str(self.source) not in (SELF, BUILT_IN):
            read_texts(Path(self.source))

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
