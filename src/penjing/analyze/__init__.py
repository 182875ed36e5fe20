"""Cost, structure, statistics and sensitivity of networks. Code in this folder reads a network and never changes it."""
