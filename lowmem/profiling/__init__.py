"""`lowmem profile`: the plan and the loader that cost least on this machine with these images, by measuring them."""
