"""Triton reads TRITON_INTERPRET when it is imported, and transformers imports it: so it is said before anything else."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
