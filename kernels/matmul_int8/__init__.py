"""int8 x int8 matrix product, dequantized before it is written."""
