"""Matrix product with bias and residual added before it is written."""
