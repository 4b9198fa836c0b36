"""Quantize a model that is larger than memory: from folder to folder, one layer at a time, without ever building the model.

The plan alone says which tensors the result has and how large each is, so its files are laid out first and every layer is read,
solved and written to its place by itself: the peak is a layer and its solver's workspace, whatever the model's size. Only plans
that learn nothing from inputs can be made so: inputs would need the model.

What is done is recorded layer by layer in a hidden folder beside the output (``.NAME.streaming``). The same command goes on where
it stopped; several processes (``torchrun``) take every n-th layer each. The folder gets its name when it is whole, and is
what ``save_pretrained`` writes after ``dqtk.quantize`` in memory, tensor by tensor.
"""

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import FORMAT_VERSION, check_output, digest, install
from .checks import check_float, check_numbers
from .fit import check_fit
from .hosts import backend_of
from .journal import Journal, claim, done
from .kernels import to_matrix
from .methods.by_level import solve_site
from .methods.shared_books import SharedVectors
from .nn import Quantized
from .nn.books import NAME as BOOKS
from .nn.books import buffer_name
from .numerics.storage import layer_layout
from .plan import Choice, Plan, Recipe
from .processes import Processes, processes
from .quantize import plan as make_plan
from .shards import LaidOutTensors, StoredTensors, read_whole, room_for, same_tensors, write_whole
from .sites import components_of
from .sources import meta_target, model_folder, read_json, stored_dtype
from .spec import ByLevel, LayerSpec, SiteSpec, from_json, shared_forms, to_json, weights_of

WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".onnx_data")


def quantize_folder(
    model: str | os.PathLike,
    output: str | os.PathLike,
    plan: Plan | Recipe | str,
    *,
    text_encoders: str | Recipe | None = None,
    overrides: Mapping[str, SiteSpec | str | None] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    progress: bool = True,
) -> Plan:
    """Quantize a saved model into another folder, layer by layer, in memory for one layer.

    Args:
        model: embedded name, folder of a pipeline or of one denoiser or text encoder, or hub id.
        output: new or empty folder. Calling again after an interruption goes on.
        plan: a plan, or a recipe (name) to plan with; none that needs statistics.
        text_encoders, overrides: for planning; see ``plan``.
        dtype: compute dtype of the result; None: as the denoiser is stored. Parts that are not planned are copied as they are.
        device: where layers are solved; None: the CUDA device if there is one.
        progress: show a bar.
    Returns:
        The plan that was carried out.
    Raises:
        ValueError: a plan that needs statistics or does not fit; a model that is quantized, damaged or incomplete; NaN; a full
            disk; unfinished work of another command.
    """
    final = check_output(output, "quantize")
    folder, target, dtype = _opened(os.fspath(model), dtype)
    plan = _planned(target, plan, text_encoders, overrides)
    me = processes()
    work = final.with_name(f".{final.name}.streaming")
    parts = [
        _Part(name, module, folder / _subfolder(name), work / "whole" / _subfolder(name), plan.of(name), dtype)
        for name, module in components_of(target).items()
        if any(choice.spec is not None for choice in plan.of(name).choices)
    ]
    task = {
        "format_version": FORMAT_VERSION,
        "plan": plan.hash,
        "recipe": plan.recipe,
        "dtype": str(dtype),
        "model": {part.name: part.stored.identity() for part in parts},
    }
    if me.first:
        _prepare(work, task, parts, folder)
    me.wait()
    _learn_books(parts, work, me, device or me.device)
    _solve_all(parts, work, me, device or me.device, progress)
    if me.first:
        for part in parts:
            part.finish(done(work), plan.recipe)
        if final.exists():
            final.rmdir()
        (work / "whole").rename(final)
        shutil.rmtree(work)
    me.wait()
    return plan


def _opened(model: str, dtype: torch.dtype | None) -> tuple[Path, Any, torch.dtype]:
    """Folder of a model, its parts on the meta device as they are built in the compute dtype, and that dtype."""
    folder = model_folder(model)
    if dtype is None:
        dtype = getattr(torch, stored_dtype(folder))
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"quantize: dtype must be float32, bfloat16 or float16, got {dtype}. Choose one of them.")
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return folder, meta_target(model), dtype
    finally:
        torch.set_default_dtype(default)


def _subfolder(component: str) -> str:
    """Where a component lies in its pipeline's folder; a component by itself is the folder."""
    return "" if component == "model" else component


def _planned(
    target: Any,
    plan: Plan | Recipe | str,
    text_encoders: str | Recipe | None,
    overrides: Mapping[str, SiteSpec | str | None] | None,
) -> Plan:
    """The plan to carry out. Raises ``ValueError`` for one that needs statistics or does not fit."""
    if not isinstance(plan, Plan):
        plan = make_plan(target, plan, text_encoders=text_encoders, overrides=overrides)
    elif text_encoders is not None or overrides:
        raise ValueError("quantize: plan must stand alone, got text_encoders or overrides too. A plan has decided already.")
    if plan.needs_stats:
        raise ValueError(
            f"quantize: a streamed plan must need no statistics of inputs, got recipe {plan.recipe!r}, which does. "
            "Choose another recipe (w8a8, w4a8-rtn, ...), or quantize in memory."
        )
    if plan.attention:
        raise ValueError(
            f"quantize: a streamed plan must leave attention alone, got recipe {plan.recipe!r}, which does not. Quantize in memory."
        )
    check_fit(plan, components_of(target))
    open_ = next((c for c in plan.choices if isinstance(c.spec, ByLevel) and not c.spec.edges), None)
    if open_ is not None:
        raise ValueError(
            f"quantize: a streamed plan must know the noise levels of its step policy, got shares of a run for {open_.site.id}. "
            "Fix it with dqtk.policy.fixed(plan, pipe), or quantize in memory."
        )
    return plan


def _prepare(work: Path, task: Mapping[str, Any], parts: list["_Part"], folder: Path) -> None:
    """Claim the work folder, lay out what is not laid out yet, and copy what stays."""
    if claim(work, task) and done(work):
        broken = next((part for part in parts if not part.out.is_reserved()), None)
        if broken is not None:
            raise ValueError(
                f"quantize: {broken.out.folder} must hold the files that were laid out, got other sizes. "
                f"Remove {work} to begin again."
            )
    else:
        for part in parts:
            part.out.reserve()
    _copy_rest(folder, work / "whole", {_subfolder(part.name) for part in parts})


def _learn_books(parts: list["_Part"], work: Path, me: Processes, device: torch.device) -> None:
    """Books that layers share: learned by the first process in one pass over their weights, and read from a file by all."""
    for part in parts:
        path = work / f"books.{part.name}.safetensors"
        if part.sharing and me.first and not path.is_file():
            write_whole(path, part.learned_books(device))
    me.wait()
    for part in parts:
        part.books = read_whole(work / f"books.{part.name}.safetensors") if part.sharing else {}


def _solve_all(parts: list["_Part"], work: Path, me: Processes, device: torch.device, progress: bool) -> None:
    finished = done(work)
    me.wait()  # all have read the same journal before anyone goes on writing it
    todo = [(part, path) for part in parts for path in part.units if part.id_of(path) not in finished]
    mine = [unit for _, unit in me.mine(todo)]
    total = len(mine) + len(finished) if me.world == 1 else len(mine)
    shown = {"unit": "layer", "disable": not (progress and me.first), "initial": total - len(mine)}
    with Journal(work, me.rank) as journal, tqdm(total=total, desc="quantize", **shown) as bar:
        for part, path in mine:
            journal.record(part.id_of(path), part.carry_out(path, device))
            bar.update()
    me.wait()


class _Part:
    """One component: where its tensors come from, where they go, and what happens to each module of it.

    A unit is a module with tensors of its own: a planned layer, or one whose tensors are copied in the compute dtype.
    """

    def __init__(self, name: str, module: nn.Module, folder: Path, output: Path, plan: Plan, dtype: torch.dtype):
        self.name, self.module, self.dtype = name, module, dtype
        self.backend: Any = cast(Any, backend_of(module))
        self.choices = {choice.site.path: choice for choice in plan.choices if choice.spec is not None}
        self.sharing = [choice for choice in self.choices.values() if shared_forms(choice.spec)]
        self.books: dict[str, Tensor] = {}
        _check_plain(folder, name)
        self.stored = StoredTensors(folder, self.backend.WEIGHTS)
        self.sources = self._sources()
        self.dtypes = self.backend.loaded_dtypes(module, dtype)
        install(module, {path: choice.spec for path, choice in self.choices.items() if choice.spec}, "quantize")
        state = module.state_dict(keep_vars=True)
        self.written: dict[str, str] = self.backend.written_names(module, state)
        twins = self._twins(state)
        mine = [n for n in self.written if n not in twins]  # in the order of the files
        tensors = {self.written[n]: (tuple(state[n].shape), self._dtype(n, state[n])) for n in mine}
        aliases = {self.written[n]: self.written[owner] for n, owner in twins.items()}
        self.out = LaidOutTensors(output, self.backend.WEIGHTS, tensors, aliases)
        self.units: dict[str, list[str]] = {}
        for n in mine:
            self.units.setdefault(n.rpartition(".")[0], []).append(n)

    def id_of(self, path: str) -> str:
        return f"{self.name}:{path}"

    def _sources(self) -> dict[str, str]:
        """Name in the model -> name in the files, of every tensor; tensors with several names have the stored one under all."""
        found = self.backend.source_names(self.module, self.stored.shapes)
        state = self.module.state_dict(keep_vars=True)
        owners = same_tensors(state, state)
        for name in state:
            twins = [n for n in state if owners.get(n, n) == owners.get(name, name)] if owners else [name]
            stored = next((found[n] for n in twins if n in found), None)
            if stored is None:
                raise ValueError(
                    f"quantize: {self.stored.folder} must hold every tensor of {type(self.module).__name__}, got none for {name}. "
                    "Was the model class or its config changed, or a file left out?"
                )
            found[name] = stored
            if self.stored.shapes[stored] != tuple(state[name].shape):
                raise ValueError(
                    f"quantize: {self.name}:{name} must have shape {tuple(state[name].shape)}, got {self.stored.shapes[stored]}. "
                    "Config and weights belong to different models."
                )
        for path in self.choices:
            check_float(self.id_of(path), self.stored.dtypes[found[f"{path}.weight"]])
        ignored = sorted(set(self.stored.shapes) - {found[name] for name in state})
        if ignored:
            warnings.warn(
                f"{self.stored.folder}: {ignored[0]} and {len(ignored) - 1} more tensors are not in {type(self.module).__name__} "
                "and are left out, as in loading.",
                stacklevel=4,
            )
        return {name: found[name] for name in state}

    def _twins(self, state: Mapping[str, Any]) -> dict[str, str]:
        """Names that are not written -> the name of the same tensor that is: the one under which it is stored now."""
        twins = same_tensors(state, state)
        for first in set(twins.values()):
            names = [first, *(n for n, owner in twins.items() if owner == first)]
            kept = next((n for n in names if self.sources.get(n) == self.written[n]), first)
            twins = {n: kept for n in names if n != kept} | {n: owner for n, owner in twins.items() if n not in names}
        return twins

    def _dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        """dtype of a tensor of the quantized model in the files to come."""
        path, _, last = name.rpartition(".")
        if path in self.choices and last == "anchor":
            return self.dtypes[f"{path}.weight"]
        if name not in self.sources:
            return tensor.dtype
        stored = self.stored.dtypes[self.sources[name]]
        return self.dtypes[name] if stored.is_floating_point else stored

    def _read(self, name: str) -> Tensor:
        tensor = self.stored.read(self.sources[name])
        return tensor.to(self.dtypes[name]) if tensor.is_floating_point() else tensor

    @torch.no_grad()
    def carry_out(self, path: str, device: torch.device) -> dict[str, Any]:
        """Solve or copy one unit and write it; returns what the journal keeps of it."""
        spec = None
        if path == BOOKS:
            tensors = {f"{BOOKS}.{buffer_name(group)}": book for group, book in self.books.items()}
        elif path in self.choices:
            spec, tensors = self._solved(path, self.choices[path], device)
        else:
            tensors = {name: self._read(name) for name in self.units[path]}
        named = {self.written[name]: tensor for name, tensor in tensors.items()}
        self.out.write(named)
        return {
            "digests": {name: digest(tensor) for name, tensor in named.items()},
            "spec": None if spec is None else to_json(spec),
        }

    @torch.no_grad()
    def learned_books(self, device: torch.device) -> dict[str, Tensor]:
        """By group, on the CPU; from weights that are read one at a time."""
        layers = [(choice, weight[0]) for choice in self.sharing if choice.spec for weight in weights_of(choice.spec)]
        layers = [(choice, part) for choice, part in layers if shared_forms(part)]
        vectors = SharedVectors((part, choice.site.num_weights) for choice, part in layers)
        for choice, part in layers:
            matrix = self._matrix(choice, device)
            check_numbers(choice.site.id, matrix, None)
            vectors.add(matrix, part, choice.site.channels)
        return {group: book.cpu() for group, book in vectors.books().items()}

    def _matrix(self, choice: Choice, device: torch.device) -> Tensor:
        weight = self._read(f"{choice.site.path}.weight").to(device)
        return weight if weight.ndim == 2 else to_matrix(weight)

    def _solved(self, path: str, choice: Choice, device: torch.device) -> tuple[SiteSpec, dict[str, Tensor]]:
        assert choice.spec is not None
        matrix = self._matrix(choice, device)
        bias = self._read(f"{path}.bias") if choice.site.bias else None
        check_numbers(choice.site.id, matrix, bias)
        (solution,) = solve_site([matrix], choice.spec, channels=choice.site.channels, books=self.books)
        rest = {"anchor": torch.empty(0, dtype=matrix.dtype)} if bias is None else {"bias": bias}
        return solution.spec, {f"{path}.{name}": tensor for name, tensor in {**solution.tensors, **rest}.items()}

    def finish(self, records: Mapping[str, Mapping[str, Any]], recipe: str) -> None:
        """Write what could not be known before: digests, the dtypes of searched formats, and the configuration."""
        digests: dict[str, str] = {}
        dtypes: dict[str, torch.dtype] = {}
        for path in self.units:
            record = records[self.id_of(path)]
            digests |= record["digests"]
            if record["spec"] is not None:
                spec, layer = from_json(record["spec"], "quantize: journal"), self.module.get_submodule(path)
                assert isinstance(spec, LayerSpec | ByLevel)
                assert isinstance(layer, Quantized)
                layer.spec = spec  # type: ignore[assignment]  # of a stepped layer
                site = self.choices[path].site
                for name, (_, dtype) in layer_layout(spec, site.n, site.k, site.channels).items():
                    dtypes[self.written[f"{path}.{name}"]] = dtype
        self.out.finish(digests, dtypes)
        self.backend.attach(self.module, recipe)
        self.backend.save_config(self.module, self.out.folder, self.dtype)


def _check_plain(folder: Path, name: str) -> None:
    """Raises ``ValueError`` for a component that is quantized already."""
    stored = read_json(folder / "config.json", "quantize").get("quantization_config")
    if stored is not None:
        raise ValueError(
            f"quantize: {name} must be unquantized to be streamed, got quant_method {stored.get('quant_method')!r}. "
            "Give the folder of the original model."
        )


# --- what stays ------------------------------------------------------------------------------------------------------


def _copy_rest(folder: Path, output: Path, planned: set[str]) -> None:
    """Copy a pipeline without its planned components' weights and configurations; what was copied before is not copied again.

    Of a pipeline's folder: the components that its index names, and files beside them that are no weights (licence, card).
    """
    listed = read_json(folder / "model_index.json", "quantize") if (folder / "model_index.json").is_file() else {}
    parts = [name for name, entry in listed.items() if isinstance(entry, list) and entry[0] and (folder / name).is_dir()]
    with room_for(f"a copy of the other parts of {folder} in {output}"):
        output.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.is_file() and _stays(path, replaced="" in planned):
                _copy_whole(path, output / path.name)
        for name in parts:
            for path in sorted((folder / name).rglob("*")):
                if path.is_file() and (name not in planned or _stays(path, replaced=path.parent == folder / name)):
                    _copy_whole(path, output / path.relative_to(folder))


def _stays(path: Path, replaced: bool) -> bool:
    """Whether a file beside replaced weights is worth keeping: no weights, hidden file, or configuration that is written anew."""
    return not (path.name.endswith(WEIGHTS) or path.name.startswith(".") or (replaced and path.name == "config.json"))


def _copy_whole(source: Path, target: Path) -> None:
    """Copy a file, links as what they lead to; it appears whole, and is left alone if it is there."""
    if target.is_file() and target.stat().st_size == source.stat().st_size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    os.replace(partial, target)
