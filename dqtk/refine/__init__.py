"""Refiners: what needs a block (or the whole denoiser) and its teacher. One refiner, one file."""
