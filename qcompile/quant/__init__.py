"""Quantizers: NumPy in, NumPy out. Nothing here knows a graph."""
