"""Maths on tensors: grids, encoding, packing."""
