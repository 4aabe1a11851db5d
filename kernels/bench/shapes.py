"""The sizes that are measured: Qwen2.5 in three sizes, prefill and decode."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dims:
    """Sizes of a model, in the words of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    num_hidden_layers: int
    tie_word_embeddings: bool


@dataclass(frozen=True)
class Phase:
    """How many sequences and tokens a call has.

    Attributes:
        name: As the tables have it.
        batch: Sequences.
        length: Tokens a sequence in this call.
        context: Tokens a sequence in the cache, for attention.
    """

    name: str
    batch: int
    length: int
    context: int

    @property
    def tokens(self) -> int:
        """Rows of every activation."""
        return self.batch * self.length


MODELS = {
    "0.5B": Dims(896, 4864, 14, 2, 64, 151936, 24, True),
    "3B": Dims(2048, 11008, 16, 2, 128, 151936, 36, True),
    "7B": Dims(3584, 18944, 28, 4, 128, 152064, 28, False),
}
PHASES = {
    "decode b1": Phase("decode b1", 1, 1, 2048),
    "decode b16": Phase("decode b16", 16, 1, 2048),
    "decode b128": Phase("decode b128", 128, 1, 2048),
    "prefill 4096": Phase("prefill 4096", 1, 4096, 4096),
    "prefill 8x4096": Phase("prefill 8x4096", 8, 4096, 4096),
}
TINY = Dims(128, 256, 4, 2, 16, 512, 2, True)  # of a dry run
TINY_PHASES = {"decode": Phase("decode", 2, 1, 24), "prefill": Phase("prefill", 1, 5, 5)}
