"""silu(gate) * up on the packed output of the gate and up projections."""
