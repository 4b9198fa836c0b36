"""CLIP (Radford et al. 2021) as an extractor of images and texts, through open_clip or through transformers.

Model, preprocessing and tokenizer are the library's own: most wrong CLIP scores come from images that were normalized twice or not
at all, or from another model's tokenizer. The image transform gets 8-bit PIL images, as at training; ``preprocess`` records
it, since the common one (shortest side to 224, centre crop) throws away the sides of anything not square.

Embeddings are returned unnormalized. "CLIP score" is the cosine, 100 times the cosine, or 2.5 times (Hessel et al. 2021),
depending on the paper: that is for the score to say. Prompts beyond ``max_tokens`` (77 for most models, special tokens
included) are cut by the tokenizer without a word; ``truncated`` tells which.

Nothing is downloaded: a hub id is looked up in the cache and loaded from there (``hub``). The libraries would otherwise ask the hub
first, and open_clip, where it finds no weights, goes on with random ones and a line in the log. What remains: an open_clip
model whose text tower is a transformers model (``hf_model_name``) reads that model's configuration through transformers, which
asks the hub unless ``HF_HUB_OFFLINE`` is set.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from .contract import as_images, as_texts
from .hub import find_folder, find_weights_in, sha256_of_texts
from .precision import whole_float32
from .pretrained import VERSION, load_pretrained
from .resize import as_pil, resize_shorter
from .weights import MissingWeights, readable, sha256_of

# open_clip's own order of preference, without its last resort, "any file in alphabetical order".
_OPEN_CLIP_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # before and since transformers 5
_HUB, _LOCAL = "hf-hub:", "local-dir:"


class OpenClip:
    """A model of open_clip.

    ``model`` is a folder with ``open_clip_config.json`` (its path, also as ``local-dir:PATH``), ``hf-hub:OWNER/NAME`` of a
    cached repository, or the name of an architecture (``ViT-B-32``) together with ``pretrained``, the path of its weights.
    ``resize_mode``: "shortest", "longest" or "squash" in place of the model's own. ``comparable`` is the caller's word that these
    are weights that papers report scores with. Raises ``MissingWeights``, and ``ValueError`` for unknown names and bad files.
    """

    def __init__(
        self,
        model: str | Path,
        pretrained: str | Path | None = None,
        *,
        resize_mode: str | None = None,
        comparable: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        open_clip = _import_open_clip()
        spec, weights, short, self.source = _locate(open_clip, str(model), pretrained)
        self.name = f"open_clip[{short}]"
        self.version = f"1, open_clip {open_clip.__version__}"
        self.comparable = comparable
        self.device = torch.device(device)
        with readable("open_clip", weights, f"weights of {short}"):
            # In two steps, so that what is hashed is what is loaded: given a folder, open_clip chooses the file itself.
            # pretrained_text: without weights in sight the factory would fetch a text tower from the hub.
            with _quiet("No pretrained weights loaded"):
                network, _, self._transform = open_clip.create_model_and_transforms(
                    spec, load_weights=False, pretrained_text=False, image_resize_mode=resize_mode
                )
            open_clip.load_checkpoint(network, str(weights), strict=True, weights_only=True)
        config = open_clip.get_model_config(spec)
        offline = {"local_files_only": True} if config["text_cfg"].get("hf_tokenizer_name") else {}
        with readable(
            "open_clip", weights.parent, f"a folder with the tokenizer of {short}, or have that tokenizer in the hub's cache"
        ):
            self._tokenizer = open_clip.get_tokenizer(spec, **offline)
        self.sha256 = sha256_of(weights)
        self.config_sha256 = _config_sha256(config, self._tokenizer, weights.parent if spec.startswith(_LOCAL) else None)
        self.network = network.float().eval().requires_grad_(False).to(self.device)
        self.dim = int(config["embed_dim"])
        self.max_tokens = int(self._tokenizer.context_length)
        self.preprocess = _described(network.visual.preprocess_cfg)
        self.logit_scale = float(network.logit_scale.exp())

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, D]."""
        pixels = torch.stack([self._transform(image) for image in as_pil(as_images(self.name, images))])
        with whole_float32():
            return self.network.encode_image(pixels.to(self.device)).float().cpu()

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Texts -> float32 [B, D]."""
        return self.network.encode_text(self._tokenizer(as_texts(self.name, texts)).to(self.device)).float().cpu()

    def truncated(self, texts: list[str]) -> list[bool]:
        """Which texts have more tokens than fit: with a little more room, does the tokenizer write more?

        Asked this way since open_clip's tokenizers have nothing in common but the call; room for eight more shows the difference
        under every layout of special tokens they know. Padding is what an empty text has in the middle.
        """
        texts, room = as_texts(self.name, texts), self.max_tokens + 8
        padding = self._tokenizer([""], room)[0, room // 2]
        used = (self._tokenizer(texts) != padding).sum(dim=1)
        wanted = (self._tokenizer(texts, room) != padding).sum(dim=1)
        return (wanted > used).tolist()


def _import_open_clip() -> Any:
    """The optional package; here and not on top, so that ``TransformersClip`` works without it."""
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"OpenClip: package open_clip must be installed, got: {error}. Run pip install 'dqtk[clip]'."
        ) from error
    return open_clip


def _locate(open_clip: Any, model: str, pretrained: str | Path | None) -> tuple[str, Path, str, str]:
    """What open_clip calls the model, its weights file, its short name and where it came from."""
    is_folder = model.startswith((_HUB, _LOCAL)) or Path(model).is_dir()
    if is_folder and pretrained is not None:
        raise ValueError(f"open_clip: pretrained must be None for a folder or hub id, got {str(pretrained)!r}. Leave it out.")
    if is_folder:
        source = model.removeprefix(_HUB).removeprefix(_LOCAL)
        folder = find_folder("open_clip", source, "open_clip_config.json")
        (weights,) = find_weights_in("open_clip", folder, _OPEN_CLIP_FILES)
        return f"{_LOCAL}{folder}", weights, source if model.startswith(_HUB) else folder.resolve().name, source
    if model not in open_clip.list_models():
        raise ValueError(
            f"open_clip: model must be a folder, {_HUB}OWNER/NAME or one of open_clip.list_models(), got {model!r}. "
            "Check the spelling."
        )
    if pretrained is None or not Path(pretrained).is_file():
        known = open_clip.get_pretrained_cfg(model, str(pretrained)).get("hf_hub", "") if pretrained else ""
        # The hub entry is OWNER/NAME/ or OWNER/NAME/FILE.
        hub_id = "/".join(known.split("/")[:2])
        remedy = f"Run `hf download {hub_id}` and pass {_HUB}{hub_id} as model." if hub_id else "Pass the path of a file."
        text = f"open_clip: pretrained must be a weights file of {model}, got {str(pretrained)!r}. {remedy}"
        raise ValueError(text) if pretrained is None else MissingWeights(text)
    return model, Path(pretrained), model, str(pretrained)


@contextmanager
def _quiet(beginning: str) -> Iterator[None]:
    """Keep log lines that begin so out of the root logger, where open_clip writes: they would be untrue here."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginning)

    logging.getLogger().addFilter(keep)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(keep)


def _config_sha256(config: dict[str, Any], tokenizer: Any, folder: Path | None) -> str:
    """Of the architecture, the tokenizer's vocabulary where it tells it, and the text files of a model's own folder."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    words = inner.get_vocab() if hasattr(inner, "get_vocab") else getattr(inner, "encoder", {})
    parts = [config, type(tokenizer).__name__, words, sha256_of_texts(folder) if folder is not None else ""]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _described(config: dict[str, Any]) -> str:
    """open_clip's preprocessing configuration as an identifier."""
    size = config["size"] if isinstance(config["size"], int) else "x".join(str(side) for side in config["size"])
    values = ", ".join(f"{key}={'/'.join(f'{value:.6g}' for value in config[key])}" for key in ("mean", "std"))
    crop = {"shortest": "+crop", "longest": "+pad", "squash": ""}[config["resize_mode"]]
    return f"pil-{config['interpolation']}, {config['resize_mode']} {size}{crop}, {values}"


class TransformersClip:
    """A CLIP of transformers: a folder written by ``CLIPModel.save_pretrained``, or a cached hub id.

    ``comparable`` is the caller's word that these are weights that papers report scores with. Images are resized by PIL even
    where torchvision is installed: published scores are older than transformers' torchvision processors, and the value must
    not depend on what else is installed. ``preprocess``: None for the folder's own, or "vbench": the shorter side by bicubic
    interpolation without antialiasing, not clipped, and a centre crop, as VBench gives CLIP its frames. ``processor``: where
    tokenizer and image processor are taken from if the model's own folder has none. Raises ``MissingWeights``, and ``ValueError``
    for unreadable or incomplete weights and another preprocessing.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        preprocess: str | None = None,
        processor: str | Path | None = None,
        comparable: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        if preprocess not in (None, "vbench"):
            raise ValueError(f"clip: preprocess must be None or 'vbench', got {preprocess!r}. None is the model's own.")
        self._vbench = preprocess == "vbench"
        folder = find_folder("clip", model, "config.json")
        self.source, self.comparable, self.device = str(model), comparable, torch.device(device)
        self.name = f"clip[{folder.resolve().name if Path(model).is_dir() else model}]"
        network, self.sha256 = load_pretrained(self.name, CLIPModel, folder)
        beside = folder
        if processor is not None and not any((folder / name).is_file() for name in _PROCESSORS):
            beside = find_folder("clip", processor, "tokenizer_config.json")
        with readable(self.name, beside, "a CLIP folder with tokenizer and preprocessor_config.json"):
            self._processor = CLIPProcessor.from_pretrained(beside, local_files_only=True, backend="pil")
        self.network = network.to(self.device)
        self.version, self.config_sha256 = f"1, {VERSION}", sha256_of_texts(folder)
        if beside != folder:
            self.config_sha256 += sha256_of_texts(beside)
        self.dim = int(network.config.projection_dim)
        self.max_tokens = int(network.config.text_config.max_position_embeddings)
        self._size = int(network.config.vision_config.image_size)
        own = _described_processor(self._processor.image_processor)
        self.preprocess = f"vbench, bicubic, shortest {self._size}+crop, own mean and std" if self._vbench else own
        self.logit_scale = float(network.logit_scale.exp())

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, D]."""
        images = as_images(self.name, images)
        if self._vbench:
            pixels = self._as_vbench(images)
        else:
            pixels = self._processor.image_processor(as_pil(images), return_tensors="pt").pixel_values
        # Not get_image_features, whose type of result changed with transformers 5.
        with whole_float32():
            pooled = self.network.vision_model(pixel_values=pixels.to(self.device)).pooler_output
        return self.network.visual_projection(pooled).float().cpu()

    def _as_vbench(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> normalized float32 [B, 3, S, S]."""
        x = resize_shorter(images.cpu(), self._size, "bicubic") / 255
        top, left = (round((side - self._size) / 2) for side in x.shape[2:])
        x = x[:, :, top : top + self._size, left : left + self._size]
        processor = self._processor.image_processor
        return (x - torch.tensor(processor.image_mean).view(3, 1, 1)) / torch.tensor(processor.image_std).view(3, 1, 1)

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Texts -> float32 [B, D]."""
        tokens = self._processor.tokenizer(
            as_texts(self.name, texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        pooled = self.network.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return self.network.text_projection(pooled).float().cpu()

    def truncated(self, texts: list[str]) -> list[bool]:
        """Which texts have more tokens, special ones included, than ``max_tokens``."""
        ids = self._processor.tokenizer(as_texts(self.name, texts), truncation=False, verbose=False).input_ids
        return [len(row) > self.max_tokens for row in ids]


def _described_processor(processor: Any) -> str:
    """An image processor's configuration as an identifier: its class, and each setting that moves pixels."""
    config = processor.to_dict()
    settings = []
    for key in ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std"):
        value = config.get(key)
        if isinstance(value, dict):
            value = "/".join(f"{name}:{side}" for name, side in sorted(value.items()) if side is not None)
        elif isinstance(value, (list, tuple)):
            value = "/".join(f"{number:.6g}" for number in value)
        settings.append(f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}")
    steps = [step for step in ("resize", "center_crop", "rescale", "normalize") if config.get(f"do_{step}")]
    return f"{type(processor).__name__}({'+'.join(steps)}), {', '.join(settings)}"
