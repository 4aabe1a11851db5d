"""qcompile: bring a trained Qwen onto Huawei Ascend, and onto any CPU with the same commands."""

__version__ = "0.1.0"
