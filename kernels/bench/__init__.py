"""Measure the kernels on a GPU: each against PyTorch, torch.compile and the vendor's, and whole decode steps."""
