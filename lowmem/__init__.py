"""lowmem: train an image classifier in a memory budget and get the classifier that an unconstrained run gives."""

__version__ = "0.1.0"
