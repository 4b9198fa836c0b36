"""How a layer computes: one ``Way`` per different spec, made once, because compilers would trace the checks of a spec."""

from dataclasses import dataclass

from dqtk.numerics.storage import suffix_of
from dqtk.ops import op_of
from dqtk.spec import ByLevel, LayerSpec, SiteSpec

from .basis import Basis


@dataclass(frozen=True, slots=True)
class Way:
    """op: what runs, see ``ops.py``. suffix: behind the names of the tensors that it reads. static: its input is calibrated."""

    spec: LayerSpec
    op: str
    basis: Basis
    suffix: str
    static: bool


def ways_of(spec: SiteSpec, kind: str, channels: int) -> dict[str, Way]:
    """The ways of a layer by the number of their spec among the kinds, as ``StepState.kind`` names it; ``kind``: of the layer."""
    weights = [(part, index) for index, weight in enumerate(spec.weights) for part in weight] if isinstance(spec, ByLevel) else []
    places = dict(weights)
    return {
        str(number): Way(
            spec=part,
            op=op_of(part, kind),
            basis=Basis.of(part, channels),
            suffix=suffix_of(places.get(part, 0)),
            static=part.needs_ranges,
        )
        for number, part in enumerate(spec.kinds if isinstance(spec, ByLevel) else (spec,))
    }
