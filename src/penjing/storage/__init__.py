"""What a network is kept in: the trainable checkpoint."""
