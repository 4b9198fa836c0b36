"""What papers on quantized video models measure of VBench, by name.

ViDiT-Q (arXiv 2406.02540), Q-VDiT and QVGen print eight of the sixteen dimensions, without a total. They need the prompts of
three of its lists: overall consistency (93, which aesthetic and imaging quality share), subject consistency (72, shared with
motion smoothness and dynamic degree) and scene (86, shared with background consistency): 251 prompts, five videos each. The
table's order is theirs. Scene needs VBench's own program; the seven others are here.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """Which prompts a paper makes videos of (those of the suite's dimensions ``prompts``), how many of each, and what it prints."""

    name: str
    prompts: tuple[str, ...]
    num_prompts: int
    videos_per_prompt: int
    dimensions: tuple[str, ...]

    def row(self, raw: Mapping[str, float]) -> tuple[list[float | None], list[str]]:
        """The paper's row in percent from raw scores, None where one is missing, and what is missing."""
        found = [raw.get(name) for name in self.dimensions]
        return [None if value is None else 100 * value for value in found], [name for name in self.dimensions if name not in raw]


EIGHT = Protocol(
    name="vbench-8",
    prompts=("overall_consistency", "subject_consistency", "scene"),
    num_prompts=251,
    videos_per_prompt=5,
    dimensions=(
        "imaging_quality",
        "aesthetic_quality",
        "motion_smoothness",
        "dynamic_degree",
        "background_consistency",
        "subject_consistency",
        "scene",
        "overall_consistency",
    ),
)
