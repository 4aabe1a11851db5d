"""Residual Add, RMSNorm and dynamic int8 quantization in one pass."""
