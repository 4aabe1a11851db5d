"""Weight-only int8 product for the few rows of a decode step."""
