"""Storage formats of a network: the trainable checkpoint, and packed files."""
