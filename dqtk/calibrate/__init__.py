"""Calibration: run prompts, watch the inputs of sites."""

from .run import calibrate
from .stats import InputStat, Key, Stats

__all__ = ["InputStat", "Key", "Stats", "calibrate"]
