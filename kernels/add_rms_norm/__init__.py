"""Residual Add and RMSNorm in one pass over the rows."""
