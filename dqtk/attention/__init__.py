"""Attention: which order its tokens are read in, which blocks of it are computed; decided from kept calls (PAROAttention)."""
