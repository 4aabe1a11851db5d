"""RMSNorm over the last axis: Qwen3's q and k norms, and the norms without a residual."""
