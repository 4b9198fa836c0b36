"""Speed and memory of a model, measured where it will run: ``bench_model``, and behind it ``dqtk bench``.

Machines are shared and clocks drift, so no time is compared with one that was taken at another moment: in every round each variant
runs once, in an order drawn anew, and what is reported are medians of ratios within a round. What is only emulated is not timed.
"""

from .run import Bench, Row, bench_model, bench_step
from .step import Step, record_step

__all__ = ["Bench", "Row", "Step", "bench_model", "bench_step", "record_step"]
