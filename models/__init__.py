"""One recipe (TOML) per checkpoint, and the bundled reasoner."""
