"""How the bundled reasoning model is made: problems, tokenizer, training recipes, and its weights."""
