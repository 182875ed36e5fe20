"""Grids and operators of integers: maths on tensors, no networks."""
