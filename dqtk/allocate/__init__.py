"""Mixed precision: which site gets which bits within a budget, from what each of them loses alone (MixDQ, arXiv 2405.17873).

``program.py`` is the integer program; it knows numbers only. ``from_logs.py`` and ``from_plans.py`` fill it: from a sensitivity
log, or from plans whose specs ``sensitivity.py`` has measured one site at a time with a ``Probe``. ``from_model.py`` does all of
it for a pipeline (``dqtk.allocate``), ``command.py`` for a line of the shell.
"""

from .from_model import allocate

__all__ = ["allocate"]
