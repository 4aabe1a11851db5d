"""From a fused graph to static graphs that CANN's ONNX parser takes: one per shape bucket, one set of weights."""
