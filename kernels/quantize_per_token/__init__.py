"""Dynamic symmetric int8 quantization, one scale a token."""
