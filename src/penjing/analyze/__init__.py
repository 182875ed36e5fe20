"""What a network costs and how it is made. Code in this folder reads a network and never changes it."""
