"""The page's words in English and Chinese."""

from __future__ import annotations

from html import escape

ROLE_WORDS: dict[str, tuple[str, str]] = {
    "embedding": ("Embedding", "词嵌入"),
    "norm": ("Norm", "归一化"),
    "qkv": ("Q K V", "QKV 投影"),
    "rotary": ("Rotary", "旋转位置"),
    "cache": ("KV cache", "KV 缓存"),
    "mask": ("Mask", "掩码"),
    "attention": ("Attention", "注意力"),
    "output": ("Output", "输出投影"),
    "residual": ("Residual", "残差"),
    "mlp": ("Feed-forward", "前馈网络"),
    "head": ("LM head", "输出头"),
    "other": ("Other", "其他"),
    "control": ("Shapes, constants", "形状与常量"),
}

# Values that cross the border of a section, where they are not called by a name of the graph.
VALUE_WORDS: dict[str, str] = {
    "hidden states": "隐藏状态",
    "feed-forward output": "前馈输出",
    "attention output": "注意力输出",
    "mask": "掩码",
    "angles": "旋转角",
    "past key": "历史 K",
    "past value": "历史 V",
    "present key": "当前 K",
    "present value": "当前 V",
}


def both(english: str, chinese: str) -> str:
    """Return a text in both languages; the style sheet shows the one chosen."""
    return f'<span lang="en">{escape(english)}</span><span lang="zh">{escape(chinese)}</span>'
