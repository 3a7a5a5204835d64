"""`lowmem bench`: what a step and an epoch cost on each device in each budget, and how devices compare."""
