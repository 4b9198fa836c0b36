"""One step of a model at 16 bits, in float32 and with each recipe, in one run.

Everything that fits into memory together runs in the same rounds. What does not is measured one variant after another, each in
rounds with the 16-bit model: ratios to it are paired all the same, and those to float32 go through it (and are marked so).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dqtk.checkpoint import quantized_layers
from dqtk.costs import CostTable, LayerShape
from dqtk.installed import installed_plan, num_parameters
from dqtk.nn import keep_decoded, kept_weights
from dqtk.nn.kept import size_of
from dqtk.ops import WEIGHT_ONLY, op_of
from dqtk.plan import Choice, Plan, Recipe
from dqtk.quantize import plan as make_plan
from dqtk.report.environment import hardware, now, versions
from dqtk.report.sizes import bytes_in_memory
from dqtk.sources import MetaPipeline
from dqtk.spec import ConstantToken, LayerSpec, ShortcutSplit, kinds_of, without

from .ceilings import Ceilings, measure_ceilings
from .layers import half_of, is_emulated, measure_costs, name_of
from .memory import NotMeasured, available, rise
from .step import Profile, Step, profile, record_step
from .timing import Spread, interleaved, times_faster, waiter
from .variants import check_attention, check_one_spec, in_dtype, is_quantized, quantized, shared_copy, unpacked

DATA_FREE = "codes rounded to nearest without data; speed and size do not depend on their values"
# Transforms that are asked for and then left out where calibration does not find what they are for.
LOOKED_FOR = ((ConstantToken,), (ShortcutSplit,), (ConstantToken, ShortcutSplit))
OWN_CODES = "the model's own codes"
_FLOAT32 = "float32"
_ROOM = 0.6  # share of free memory that variants may take together: steps and the rest of the machine need some too
_PROFILES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One variant of the denoiser.

    seconds: of one step; None for one that is not timed, and ``note`` says why. over_16_bit, over_float32: how many times faster;
    None for the variant itself. paired: whether over_float32 comes from the same rounds. disk_bytes: of the denoiser's file.
    weight_bytes: as they lie in memory. working_bytes: what a step takes beside them; None where the system does not say
    (``note``). outside: share of the step outside the layers that the recipe quantizes. roofline: least time of those layers by the
    ceilings, over their time. kernels: what ran -> layers. emulated: layers without a kernel here; where there are any, nothing
    of the variant is timed. kept_bytes: of decoded weights among weight_bytes (``nn.keep_decoded``).
    """

    name: str
    disk_bytes: int
    seconds: Spread | None = None
    over_16_bit: Spread | None = None
    over_float32: Spread | None = None
    paired: bool = True
    weight_bytes: int | None = None
    working_bytes: int | None = None
    outside: float | None = None
    roofline: float | None = None
    kernels: dict[str, int] = field(default_factory=dict)
    emulated: int = 0
    kept_bytes: int = 0
    note: str = ""

    @property
    def memory_bytes(self) -> int | None:
        """Weights and working memory: what a step takes at its peak."""
        return None if self.weight_bytes is None or self.working_bytes is None else self.weight_bytes + self.working_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What ``bench_step`` measured, and where. codes: whose codes were timed. costs: a row per distinct layer, if asked for."""

    model: str
    component: str
    class_name: str
    batch: int
    asked: dict[str, int]
    num_calls: int
    dtype: str
    device: str
    repeats: int
    codes: str
    rows: tuple[Row, ...]
    ceilings: Ceilings
    costs: CostTable | None
    versions: dict[str, str]
    hardware: dict[str, str]
    created: str

    def table(self) -> str:
        """Tables for people."""
        from .table import text_of

        return text_of(self)

    def to_json(self) -> dict[str, Any]:
        """JSON-clean data; ``CostTable.load`` reads the costs from it."""
        names = [name for name in self.__slots__ if name not in ("rows", "ceilings", "costs")]  # type: ignore[attr-defined]
        return {
            "benchmark": "bench",
            **{name: getattr(self, name) for name in names},
            "rows": [asdict(row) | {"memory_bytes": row.memory_bytes} for row in self.rows],
            "ceilings": asdict(self.ceilings),
            "costs": None if self.costs is None else self.costs.to_json(),
        }


def bench_model(
    pipe: Any,
    recipes: Sequence[str | Recipe] = (),
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    batch: int = 1,
    repeats: int = 7,
    layers: bool = False,
    kept_decoded: float | str | None = None,
    model: str = "",
    progress: bool = True,
) -> Bench:
    """Time one denoising step of a pipeline with each recipe beside the pipeline at 16 bits and in float32.

    Args:
        pipe: diffusers pipeline on its device, in its compute dtype. It is not changed.
        recipes: names or recipes; none for a pipeline that is quantized already.
        height, width, num_frames, batch: as ``record_step``.
        repeats: rounds.
        layers: also measure every distinct layer by itself, as a cost table.
        kept_decoded: budget of ``nn.keep_decoded``; every recipe whose layers decode their weights is timed with it too.
        model: name, for the table.
        progress: show a bar.
    Raises:
        ValueError: recipes and pipeline do not fit, unknown names, sizes that the pipeline does not take.
    """
    step = record_step(pipe, height=height, width=width, num_frames=num_frames, batch=batch)
    how: dict[str, Any] = {"repeats": repeats, "layers": layers, "kept_decoded": kept_decoded}
    return bench_step(step, recipes, **how, model=model, progress=progress)


def bench_step(
    step: Step,
    recipes: Sequence[str | Recipe] = (),
    *,
    repeats: int = 7,
    layers: bool = False,
    kept_decoded: float | str | None = None,
    model: str = "",
    progress: bool = True,
) -> Bench:
    """``bench_model`` for a recorded step: the pipeline's other parts may be gone."""
    work = _Work.of(step, recipes, repeats, None if kept_decoded is None else size_of(kept_decoded))
    groups = work.groups()
    costs = work.num_costs if layers else 0
    with tqdm(total=work.num_runs(groups) + costs, desc="bench", unit="step", disable=not progress) as bar, torch.no_grad():
        ceilings = measure_ceilings(step.device, half_of(step.dtype))
        for names in groups:
            work.measure(names, bar.update)
        rows = work.rows(ceilings)
        table = work.cost_table(bar.update) if layers else None
    return Bench(
        model=model,
        component=step.component,
        class_name=type(step.module).__name__,
        batch=step.batch,
        asked=step.asked,
        num_calls=len(step.calls),
        dtype=name_of(step.dtype),
        device=step.device.type,
        repeats=repeats,
        codes=OWN_CODES if is_quantized(step.module) else DATA_FREE,
        rows=rows,
        ceilings=ceilings,
        costs=table,
        versions=versions(),
        hardware=hardware(step.device),
        created=now(),
    )


def _plans(step: Step, recipes: Sequence[str | Recipe]) -> dict[str, Plan]:
    """Name -> plan of the denoiser. Raises ``ValueError`` for recipes that do not fit, or none where there must be some."""
    target = MetaPipeline({step.component: step.module})
    if is_quantized(step.module) and not recipes:
        stored = installed_plan(target)
        check_one_spec(stored.choices)
        return {stored.recipe or "as stored": stored}
    if not recipes:
        raise ValueError("bench: recipes must name at least one for an unquantized model, got none. For example w8a8 w4a8.")
    plans = [make_plan(target, recipe) for recipe in recipes]
    for plan in plans:
        check_attention(plan.attention)
        check_one_spec(plan.choices)
    return {plan.recipe: plan for plan in plans}


@dataclass(slots=True)
class _Work:
    """A run in progress. half: name of the 16-bit variant. times: variant -> seconds per round, of each group's own rounds."""

    step: Step
    plans: dict[str, Plan]
    repeats: int
    half: str
    builders: dict[str, Callable[[], nn.Module]]
    times: dict[str, list[float]] = field(default_factory=dict)
    against: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    working: dict[str, int | None] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    profiles: dict[str, list[Profile]] = field(default_factory=dict)
    kernels: dict[str, dict[str, int]] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def of(step: Step, recipes: Sequence[str | Recipe], repeats: int, budget: int | None) -> "_Work":
        plans, half = _plans(step, recipes), half_of(step.dtype)
        plain = unpacked(step.module) if is_quantized(step.module) else step.module
        builders: dict[str, Callable[[], nn.Module]] = {
            name_of(half): lambda: in_dtype(plain, half),
            _FLOAT32: lambda: in_dtype(plain, torch.float32),
        }
        work = _Work(step, {}, repeats, name_of(half), builders)
        for name, plan in plans.items():
            work.plans[name] = plan
            if not work.emulated(plan):
                builders[name] = _builder(step.module, plan)
                if budget is not None and _decodes(plan):
                    work.kept[f"{name}, kept"] = budget
                    work.plans[f"{name}, kept"] = plan
                    builders[f"{name}, kept"] = _keeping(builders[name], budget)
        if budget is not None and not work.kept:
            raise ValueError(
                "bench: kept_decoded must stand with a recipe whose layers decode their weights, got none. For example w4a16."
            )
        return work

    def emulated(self, plan: Plan) -> list[Choice]:
        chosen = [choice for choice in plan.choices if choice.spec is not None]
        return [c for c in chosen if any(is_emulated(spec, c.site.kind, self.step.device) for spec in kinds_of(c.spec))]

    # --- what runs together ------------------------------------------------------------------------------------------

    def groups(self) -> list[list[str]]:
        """Variants whose rounds are shared, each time with the 16-bit one: all, or one after another."""
        others = [name for name in self.builders if name != self.half]
        there = available(self.step.device)
        need = sum(self._new_bytes(name) for name in self.builders)
        together = there is not None and need <= _ROOM * there
        return [[self.half, *others]] if together else [[self.half, name] for name in others]

    def _new_bytes(self, name: str) -> int:
        """Bytes that a variant adds to the module that is there."""
        parameters = num_parameters(self.step.module)
        if name in (self.half, _FLOAT32):
            here = name == name_of(self.step.dtype) and not quantized_layers(self.step.module)
            return 0 if here else parameters * (4 if name == _FLOAT32 else 2)
        plan = self.plans[name]
        own = sum(choice.bytes_after for choice in plan.choices if choice.spec is not None)
        own += sum(plan.book_bytes(component.name) for component in plan.components)
        return own + self.kept.get(name, 0)

    def num_runs(self, groups: Sequence[Sequence[str]]) -> int:
        rounds = sum(len(group) * (1 + self.repeats) for group in groups)
        return rounds + len(self.builders) * (1 + self._num_profiles)

    @property
    def _num_profiles(self) -> int:
        return min(_PROFILES, self.repeats)

    # --- measuring ---------------------------------------------------------------------------------------------------

    def measure(self, names: Sequence[str], done: Callable[[], object]) -> None:
        modules = {name: self.builders[name]() for name in names}
        runs = {name: self.step.runner(module, self._dtype(name)) for name, module in modules.items()}
        times = interleaved(runs, self.repeats, wait=waiter(self.step.device), done=done)
        for name, module in modules.items():
            self.against[name] = times
            if name in self.times:
                continue  # the 16-bit variant of a later group
            self.times[name] = times[name]
            self.weights[name] = bytes_in_memory(module)
            self.kept[name] = sum(weight.nbytes for weight in kept_weights(module))
            try:
                self.working[name] = rise(runs[name], self.step.device)
            except NotMeasured as reason:
                self.working[name], self.notes[name] = None, f"memory not measured: {reason}"
            done()
            layers = quantized_layers(module)
            self.kernels[name] = dict(Counter(layer.kernel() for layer in layers.values()).most_common())
            planned = dict.fromkeys(c.site.path for plan in self.plans.values() for c in plan.choices if c.spec)
            how = (module, runs[name], list(layers or planned), self.step.device)
            self.profiles[name] = []
            for _ in range(self._num_profiles):
                self.profiles[name].append(profile(*how))
                done()

    def _dtype(self, name: str) -> torch.dtype:
        return {self.half: half_of(self.step.dtype), _FLOAT32: torch.float32}.get(name, self.step.dtype)

    # --- results -----------------------------------------------------------------------------------------------------

    def rows(self, ceilings: Ceilings) -> tuple[Row, ...]:
        return tuple(self._row(name, ceilings) for name in (self.half, _FLOAT32, *self.plans))

    def _row(self, name: str, ceilings: Ceilings) -> Row:
        plan = self.plans.get(name)
        emulated = [] if plan is None else self.emulated(plan)
        disk = num_parameters(self.step.module) * (4 if name == _FLOAT32 else 2)
        if plan is not None:
            disk = int(plan.sizes(self.step.component)["bytes_after"])
        if emulated:
            num = sum(choice.spec is not None for choice in plan.choices) if plan is not None else 0
            note = f"not timed: {len(emulated)} of {num} quantized layers are emulated on {self.step.device.type}"
            return Row(name=name, disk_bytes=disk, emulated=len(emulated), note=note)
        over_float32, paired = self._over_float32(name)
        profiles = self.profiles[name]
        return Row(
            name=name,
            disk_bytes=disk,
            seconds=Spread.of(self.times[name]),
            over_16_bit=None if name == self.half else times_faster(self.against[name][self.half], self.against[name][name]),
            over_float32=over_float32,
            paired=paired,
            weight_bytes=self.weights[name],
            working_bytes=self.working[name],
            outside=Spread.of([found.outside for found in profiles]).median,
            roofline=self._roofline(name, ceilings),
            kernels=self.kernels[name],
            kept_bytes=self.kept[name],
            note=self.notes.get(name, ""),
        )

    def _over_float32(self, name: str) -> tuple[Spread | None, bool]:
        """Ratios to float32, and whether they are of the same rounds."""
        if name == _FLOAT32:
            return None, True
        times = self.against[_FLOAT32 if name == self.half else name]
        if _FLOAT32 in times:
            return times_faster(times[_FLOAT32], times[name]), True
        to_half, half = times_faster(times[self.half], times[name]), self.against[_FLOAT32]
        slow = times_faster(half[_FLOAT32], half[self.half])
        product = [getattr(to_half, end) * getattr(slow, end) for end in ("median", "low", "high")]
        return Spread(median=product[0], low=product[1], high=product[2]), False

    def _specs(self, name: str) -> Mapping[str, LayerSpec | None]:
        plan = self.plans.get(name)
        return {} if plan is None else {choice.site.path: next(iter(kinds_of(choice.spec)), None) for choice in plan.choices}

    def _roofline(self, name: str, ceilings: Ceilings) -> float | None:
        """Least time of the watched layers over their time, the median of the profiles."""
        specs, dtype = self._specs(name), self._dtype(name)
        shares = []
        for found in self.profiles[name]:
            least = sum(
                ceilings.seconds(shape, specs.get(path), dtype) for path, calls in found.layers.items() for _, shape in calls
            )
            if found.inside:
                shares.append(least / found.inside)
        return Spread.of(shares).median if shares else None

    # --- layer by layer ----------------------------------------------------------------------------------------------

    def calls(self) -> dict[str, tuple[LayerShape, ...]]:
        """Site id -> the shapes of its calls in one step."""
        found = self.profiles[self.half][0].layers
        return {f"{self.step.component}:{path}": tuple(shape for _, shape in calls) for path, calls in found.items()}

    def wanted(self) -> dict[LayerShape, list[LayerSpec]]:
        """Shape -> the specs that some plan has there, also without what calibration may not find there."""
        calls = self.calls()
        wanted: dict[LayerShape, list[LayerSpec]] = {shape: [] for shapes in calls.values() for shape in shapes}
        for plan in self.plans.values():
            for choice in plan.choices:
                for shape in calls.get(choice.site.id, ()):
                    for spec in kinds_of(choice.spec):
                        for found in (spec, *(without(spec, *kinds) for kinds in LOOKED_FOR)):
                            wanted[shape] += [] if found in wanted[shape] else [found]
        return wanted

    @property
    def num_costs(self) -> int:
        """Distinct weight shapes, about as many as there will be layers to measure."""
        return len({choice.site.shape for plan in self.plans.values() for choice in plan.choices if choice.spec is not None})

    def cost_table(self, done: Callable[[], object]) -> CostTable:
        device = self.step.device
        costs = measure_costs(self.wanted(), self.step.dtype, device, self.repeats, done)
        return CostTable(
            dtype=name_of(self.step.dtype),
            device=device.type,
            hardware=hardware(device),
            versions=versions(),
            costs=tuple(costs),
            calls=self.calls(),
        )


def _builder(module: nn.Module, plan: Plan) -> Callable[[], nn.Module]:
    """Makes the variant of a plan: the module as it is, if its layers are quantized already."""
    if is_quantized(module):
        return lambda: module
    return lambda: quantized(module, plan.choices, plan.attention)


def _decodes(plan: Plan) -> bool:
    """Whether layers of a plan decode what they multiply with."""
    kinds = ((spec, choice.site.kind) for choice in plan.choices for spec in kinds_of(choice.spec))
    return any(op_of(spec, kind) in WEIGHT_ONLY for spec, kind in kinds)


def _keeping(build: Callable[[], nn.Module], budget: int) -> Callable[[], nn.Module]:
    """Makes a copy of a variant that keeps decoded weights."""

    def made() -> nn.Module:
        module = shared_copy(build())
        keep_decoded(module, budget)
        return module

    return made
