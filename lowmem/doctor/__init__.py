"""`lowmem doctor`: what this computer has for training, what is in the way, and what to type."""
