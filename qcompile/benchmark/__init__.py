"""How fast a compiled model is on this machine, and how far that is from what the machine allows."""
