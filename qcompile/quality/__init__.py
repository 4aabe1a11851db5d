"""How far one compiled model's answers are from another's: perplexity, KL, agreement, and where the two part."""
