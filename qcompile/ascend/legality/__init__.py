"""Whether ATC will take a graph, decided offline: `check_model` and its rules."""
