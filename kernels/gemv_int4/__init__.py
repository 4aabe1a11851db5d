"""Weight-only int4 product for the few rows of a decode step."""
