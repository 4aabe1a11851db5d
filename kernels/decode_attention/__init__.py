"""Grouped-query attention of one query token a sequence over its KV cache."""
