"""The loop that refiners share: Adam with a rate that rises briefly and then falls to zero, resumable to the same bits.

Everything that an iteration does is a function of its number: which calls it takes, and its rates. So a file of the learned
numbers, Adam's moments and the number of iterations is all that resuming needs. What else changes while it runs (codes that move in
steps) is kept in the same file, which is written when nothing is halfway.

Processes that learn together share the calls of every iteration, and each takes the same step with the mean of their gradients. One
process or several: only the order of sums differs.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .team import ALONE, Team

WARMUP = 0.05  # of the iterations
SAVES = 20  # of the file while it runs, at most


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
        self.held = held
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
    ) -> None:
        """All iterations that are left.

        Args:
            loss_of: number of a call, from 0 to iterations * batch -> scalar.
            file: where the state is kept; one process writes it.
            identity: what the file must belong to.
            words: for the bar.
            progress: show a bar with the time left.
            begin: called with every iteration before it; the numbers that it has put anew, whose moments are forgotten.
            after: called with the number of iterations done, before the file is written.
            pace: iterations after which there is nothing halfway; the file is only written then, and at the end.
        Raises:
            ValueError: a loss that is no number, or a file of another run.
        """
        if file is not None and file.exists():
            self._load(file, identity)
        every = math.ceil(max(1, self.iterations // SAVES) / pace) * pace
        writes = file is not None and self.team.rank == 0
        shown = progress and self.team.rank == 0
        with tqdm(total=self.iterations, initial=self.done, desc=words, unit="step", disable=not shown) as bar:
            while self.done < self.iterations:
                for parameter in begin(self.done):
                    self.adam.state.pop(parameter, None)
                loss = self._step(loss_of)
                self.done += 1
                after(self.done)
                bar.update()
                if self.done % every == 0 or self.done == self.iterations:
                    bar.set_postfix_str(f"loss {loss:.3g}", refresh=False)
                    if writes and file is not None:
                        self._save(file, identity)

    def _step(self, loss_of: Callable[[int], Tensor]) -> float:
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * rate_at(self.done, self.iterations)
        self.adam.zero_grad()
        value = torch.zeros(1)
        for place in range(self.team.rank, self.batch, self.team.world):
            loss = loss_of(self.done * self.batch + place) / self.batch
            value += loss.detach().cpu()
            loss.backward()
        for mine in self.kept:
            mine.pull()
        self._average(value)
        if not math.isfinite(value):
            raise ValueError(f"refine: loss must be a number, got {float(value)} at iteration {self.done}. Lower the rates.")
        self.adam.step()
        for mine in self.kept:
            mine.push()
        return float(value)

    def _average(self, value: Tensor) -> None:
        """Loss and gradients of all processes in place of this one's."""
        self.team.add(value)
        for parameter in self.named.values():
            if parameter.grad is None:  # none of this process's calls reached it
                parameter.grad = torch.zeros_like(parameter)
            self.team.add(parameter.grad)

    # --- files -------------------------------------------------------------------------------------------------------

    def _save(self, file: Path, identity: str) -> None:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.named.items():
            state = self.adam.state.get(parameter, {})
            tensors[f"{name}|learned"] = parameter.detach()
            tensors |= {f"{name}|{what}": state[what] for what in ("step", "exp_avg", "exp_avg_sq") if what in state}
        tensors |= {f"{name}|held": tensor for name, tensor in self.held.items()}
        partial = file.with_name(f".{file.name}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            facts = {"done": str(self.done), "identity": identity}
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=facts)
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)

    @torch.no_grad()
    def _load(self, file: Path, identity: str) -> None:
        try:
            stored = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"refine: {file} must be a file of an interrupted run, got {error}. Remove it.") from error
        with stored:
            facts = stored.metadata() or {}
            if facts.get("identity") != identity:
                raise ValueError(
                    f"refine: {file} must belong to this model, these calls and this choice ({identity}), got "
                    f"{facts.get('identity')}. Remove it, or choose another name."
                )
            for name, parameter in self.named.items():
                parameter.copy_(stored.get_tensor(f"{name}|learned"))
                found = {
                    what: stored.get_tensor(f"{name}|{what}")
                    for what in ("step", "exp_avg", "exp_avg_sq")
                    if f"{name}|{what}" in stored.keys()  # noqa: SIM118, not a mapping
                }
                if found:
                    self.adam.state[parameter] = {
                        what: tensor if what == "step" else tensor.to(parameter.device) for what, tensor in found.items()
                    }
            for name, tensor in self.held.items():
                tensor.copy_(stored.get_tensor(f"{name}|held"))
            self.done = int(facts["done"])
        for mine in self.kept:
            mine.push()


def identity_of(**facts: object) -> str:
    """Facts as the file keeps them."""
    return json.dumps(facts, sort_keys=True, default=str)
