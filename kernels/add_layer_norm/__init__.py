"""Residual Add and LayerNorm in one pass over the rows."""
