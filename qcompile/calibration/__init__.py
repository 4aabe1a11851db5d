"""Calibration: run a model on text, block by block, and keep what quantizers need to know about its activations."""
