"""Mixed precision: which site gets which bits within a budget, from what each of them loses alone (MixDQ, arXiv 2405.17873).

The program is ``program.py``; it knows numbers only.
"""

from .program import Allocation, Candidate, allocate, protected

__all__ = ["Allocation", "Candidate", "allocate", "protected"]
