"""Rotary embedding of queries and keys, keys and values written into the KV cache."""
