"""Greedy and top-k choice of the next token over the vocabulary."""
