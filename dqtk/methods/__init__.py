"""Solvers and transforms; one method, one file. ``solve.py`` picks the solver."""
