"""Mixed precision: which site gets which bits within a budget, from what each of them loses alone (MixDQ, arXiv 2405.17873).

``program.py`` is the integer program; it knows numbers only. ``from_logs.py`` and ``from_plans.py`` fill it: from a sensitivity
log, or from plans whose specs ``sensitivity.py`` has measured one site at a time with a ``Probe``. ``command.py`` is the verb.
"""

from .program import Allocation, Candidate, allocate, protected

__all__ = ["Allocation", "Candidate", "allocate", "protected"]
