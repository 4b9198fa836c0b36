"""The loop that refiners share: Adam with a rate that rises briefly and then falls to zero, resumable to the same bits.

Which calls an iteration takes is a function of its number, and so are its rates, up to how often they were halved. So a file of the
learned numbers, Adam's moments and a few counts is all that resuming needs. What else changes while it runs (codes that move in
steps) is kept in the same file, which is written when nothing is halfway.

The error of a few calls may be watched: rates that serve most of a run can be too high for a part of it, and the errors of all
calls then rise a hundredfold in two iterations (tiny-sdxl with outliers at W4A8; the lab log). Where the watched error has risen,
the run goes back to the last look that found it near the least so far, and on from there at half the rates. Where it never does,
nothing changes.

Processes that learn together share the calls of every iteration, and each takes the same step with the mean of their gradients. One
process or several: only the order of sums differs.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .team import ALONE, Team

WARMUP = 0.05  # of the iterations
SAVES = 20  # of the file while it runs, at most; and looks at what is watched
NEAR, RISE = 1.25, 4.0  # times the least error watched so far: still good; learning went wrong
HALVINGS = 6  # of the rates, at most
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of Adam
COUNTS = ("done", "halved", "least")
GOOD = "good|"  # before names in a file: of what is gone back to, where that is not what is there now


def rate_at(iteration: int, iterations: int) -> float:
    """What learning rates are multiplied with: up to 1 in the first twentieth, then half a cosine down to 0."""
    rise = min(1.0, (iteration + 1) / (WARMUP * iterations))
    return rise * (1 + math.cos(math.pi * iteration / iterations)) / 2


def call_at(iteration: int, num: int, seed: int) -> int:
    """Which of ``num`` calls is taken when: all in a drawn order, then all in another."""
    turn, place = divmod(iteration, num)
    draw = torch.Generator().manual_seed(seed * 1_000_003 + turn)
    return int(torch.randperm(num, generator=draw)[place])


def drawn_at(turn: int, weights: Sequence[float], seed: int, batch: int = 1) -> int:
    """Which call is taken when, drawn as often as it weighs; some may come before all have been.

    The ``batch`` turns of an iteration lie at equal distances along the weights: where calls are in the order of levels, every
    iteration sees all parts of a run, and none is worked on while the others are out of sight.
    """
    iteration, place = divmod(turn, batch)
    draw = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
    ends = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    mark = (place + torch.rand((), generator=draw, dtype=torch.float64)) / batch * ends[-1]
    return int(torch.searchsorted(ends, mark.clamp(max=ends[-1] * (1 - 1e-12)), right=True))


class Kept:
    """A parameter of the host that learns (bias, norm, table): the learned numbers in float32, the parameter in its own dtype."""

    def __init__(self, parameter: nn.Parameter):
        self.parameter, self.start = parameter, parameter.detach().clone()
        self.learned = nn.Parameter(parameter.detach().float().clone())

    def pull(self) -> None:
        """Take the gradient over."""
        grad = self.parameter.grad
        self.learned.grad = None if grad is None else grad.float()
        self.parameter.grad = None

    @torch.no_grad()
    def push(self) -> None:
        """Give the parameter what was learned."""
        self.parameter.copy_(self.learned)

    @torch.no_grad()
    def restore(self) -> None:
        """The parameter as it was."""
        self.parameter.copy_(self.start)


class Descent:
    """Adam over groups of named numbers.

    groups: rate -> name -> parameter, float32. kept: those of them that stand for parameters of the host. batch: calls per
    iteration. team: who shares them. held: what ``after`` changes in place, by name.
    """

    def __init__(
        self,
        groups: Sequence[tuple[float, Mapping[str, nn.Parameter]]],
        kept: list[Kept],
        iterations: int,
        batch: int = 1,
        team: Team = ALONE,
        held: Mapping[str, Tensor] = MappingProxyType({}),
    ):
        self.kept, self.iterations, self.batch, self.team, self.done = kept, iterations, batch, team, 0
        self.held, self.halved, self.least = held, 0, math.inf
        self.good: dict[str, Tensor] = {}  # where to go back to
        self.named = {name: parameter for _, mine in groups for name, parameter in mine.items()}
        self.rates = [rate for rate, _ in groups]
        self.adam = torch.optim.Adam([{"params": list(mine.values()), "lr": rate} for rate, mine in groups])

    def run(
        self,
        loss_of: Callable[[int], Tensor],
        file: Path | None,
        identity: str,
        words: str,
        progress: bool,
        begin: Callable[[int], Sequence[nn.Parameter]] = lambda iteration: (),
        after: Callable[[int], None] = lambda done: None,
        pace: int = 1,
        watch: Callable[[], float] | None = None,
        forget: Callable[[], None] = lambda: None,
    ) -> None:
        """All iterations that are left; or, where what is watched rises at the lowest rates too, none behind the last good look.

        Args:
            loss_of: number of a call, from 0 to iterations * batch -> scalar.
            file: where the state is kept; one process writes it.
            identity: what the file must belong to.
            words: for the bar.
            progress: show a bar with the time left.
            begin: called with every iteration before it; the numbers that it has put anew, whose moments are forgotten.
            after: called with the number of iterations done, before the file is written.
            pace: iterations after which there is nothing halfway; the file is only written then, and at the end.
            watch: the error that must not rise, the same in every process; nothing is watched without it.
            forget: called where the run goes back, of what ``after`` has gathered.
        Raises:
            ValueError: a loss that is no number (where something is watched: at the lowest rates too), or a file of another run.
        """
        if file is not None and file.exists():
            self._load(file, identity)
        elif watch is not None:
            self.least = self._finite(watch())
        if watch is not None and not self.good:
            self._keep()
        every = math.ceil(self.iterations / SAVES / pace) * pace
        writes = file is not None and self.team.rank == 0
        with tqdm(
            total=self.iterations, initial=self.done, desc=words, unit="step", disable=not progress or self.team.rank > 0
        ) as bar:
            while self.done < self.iterations and self.halved <= HALVINGS:
                for parameter in begin(self.done):
                    self.adam.state.pop(parameter, None)
                loss = self._step(loss_of)
                self.done += 1
                after(self.done)
                bar.update()
                if math.isfinite(loss) and self.done % every and self.done < self.iterations:
                    continue
                bar.set_postfix_str(f"loss {loss:.3g}", refresh=False)
                if watch is not None and not self._goes_well(watch() if math.isfinite(loss) else loss, words, bar.disable):
                    forget()
                    bar.update(self.done - bar.n)
                elif writes and file is not None:
                    self._save(file, identity)

    def _step(self, loss_of: Callable[[int], Tensor]) -> float:
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * rate_at(self.done, self.iterations) / 2**self.halved
        self.adam.zero_grad()
        value = torch.zeros(1)
        for place in range(self.team.rank, self.batch, self.team.world):
            loss = loss_of(self.done * self.batch + place) / self.batch
            value += loss.detach().cpu()
            loss.backward()
        for mine in self.kept:
            mine.pull()
        self._average(value)
        if not math.isfinite(value) and self.good:
            return float(value)  # no step: what is watched takes it back
        self._finite(float(value))
        self.adam.step()
        for mine in self.kept:
            mine.push()
        return float(value)

    def _finite(self, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError(f"refine: loss must be a number, got {value} at iteration {self.done}. Lower the rates.")
        return value

    def _goes_well(self, found: float, words: str, quiet: bool) -> bool:
        """Whether the error that is watched has not risen. If it has, the run is back where it was good; that is told unless
        ``quiet``, and warned of where it is the end."""
        if found <= RISE * self.least:
            self.least = min(self.least, found)
            if found <= NEAR * self.least:
                self._keep()
            return True
        came, least, halved = self.done, self.least, self.halved + 1
        if halved > HALVINGS:
            self._finite(found)
        self._be(self.good.__getitem__, self.good.keys())
        self.halved, said = halved, f"{words}: error {found:.3g} at step {came}, where it had been {least:.3g}"
        if halved > HALVINGS and self.team.rank == 0:
            warnings.warn(
                f"{said}, at {2**HALVINGS} times lower rates too; ends with step {self.done}. Lower the rates.", stacklevel=2
            )
        elif not quiet:
            tqdm.write(f"{said}; goes on from step {self.done} at half the rates")
        return False

    def _average(self, value: Tensor) -> None:
        """Loss and gradients of all processes in place of this one's."""
        self.team.add(value)
        for parameter in self.named.values():
            if parameter.grad is None:  # none of this process's calls reached it
                parameter.grad = torch.zeros_like(parameter)
            self.team.add(parameter.grad)

    # --- states ------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Tensor]:
        """All that going on needs, by name; not copied."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.named.items():
            moments = self.adam.state.get(parameter, {})
            found[f"{name}|learned"] = parameter.detach()
            found |= {f"{name}|{what}": moments[what] for what in MOMENTS if what in moments}
        found |= {f"{name}|held": tensor for name, tensor in self.held.items()}
        return found | {what: torch.tensor(getattr(self, what), dtype=torch.float64) for what in COUNTS}

    def _keep(self) -> None:
        """What there is now is what is gone back to; in CPU memory."""
        for name, tensor in self._state().items():
            if name in self.good:
                self.good[name].copy_(tensor)
            else:
                self.good[name] = tensor.to("cpu", copy=True).contiguous()

    @torch.no_grad()
    def _be(self, state: Callable[[str], Tensor], names: Collection[str]) -> None:
        """Be as a state says."""
        self.adam.state.clear()
        for name, parameter in self.named.items():
            parameter.copy_(state(f"{name}|learned"))
            moments = {what: state(f"{name}|{what}") for what in MOMENTS if f"{name}|{what}" in names}
            if moments:
                where = {what: "cpu" if what == "step" else parameter.device for what in moments}
                self.adam.state[parameter] = {what: moment.to(where[what], copy=True) for what, moment in moments.items()}
        for name, tensor in self.held.items():
            tensor.copy_(state(f"{name}|held"))
        self.done, self.halved, self.least = int(state("done")), int(state("halved")), float(state("least"))
        for mine in self.kept:
            mine.push()

    def _save(self, file: Path, identity: str) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in self._state().items()}
        if self.good and int(self.good["done"]) != self.done:
            tensors |= {GOOD + name: tensor for name, tensor in self.good.items()}
        partial = file.with_name(f".{file.name}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata={"identity": identity})
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)

    def _load(self, file: Path, identity: str) -> None:
        try:
            stored = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"refine: {file} must be a file of an interrupted run, got {error}. Remove it.") from error
        with stored:
            found = (stored.metadata() or {}).get("identity") if "done" in stored.keys() else "one of an older version"  # noqa: SIM118
            if found != identity:
                raise ValueError(
                    f"refine: {file} must belong to this model, these calls and this choice ({identity}), got {found}. Remove it, "
                    "or choose another name."
                )
            self._be(stored.get_tensor, stored.keys())
            self.good = {name.removeprefix(GOOD): stored.get_tensor(name) for name in stored.keys() if name.startswith(GOOD)}  # noqa: SIM118


def identity_of(**facts: object) -> str:
    """Facts as the file keeps them."""
    return json.dumps(facts, sort_keys=True, default=str)
