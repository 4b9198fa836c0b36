"""VBench (Huang et al. 2024, arXiv 2311.17982) as data: its suite of prompts, its file names, its results and how they add up.

The scores themselves are files of ``dqtk.metrics`` like any other; VBench's own package is never imported.
"""
