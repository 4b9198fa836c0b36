"""One calibration for several processes, and for the run after an interrupted one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dqtk.plan import Plan
from dqtk.processes import Processes

from .run import calibrate
from .stats import Stats


def calibrate_together(pipe: Any, prompts: Sequence[str], plan: Plan, file: Path, processes: Processes, **how: Any) -> Stats:
    """``calibrate`` with ``output=file`` in the first process, which the others read; ``how``: its other arguments.

    The file is read back by the first too, so that all have the same numbers whatever they were computed on.
    """
    if processes.first:
        file.parent.mkdir(parents=True, exist_ok=True)
        calibrate(pipe, prompts, plan, output=file, **how)
    processes.wait()
    return Stats.load(file)
