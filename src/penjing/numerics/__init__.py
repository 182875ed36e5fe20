"""Quantization grids and operators: functions on tensors, no networks."""
