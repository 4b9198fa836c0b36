"""The captioned world that the embedded pipelines paint: deterministic 64x64 pictures with captions.

Three kinds of scene, each fully described by a frozen dataclass and by its caption:

* ``Single``:   "a large red circle in the top left on a striped background"
* ``Several``:  "three small blue squares on a plain black background"
* ``Relation``: "a red circle above a blue square on a gradient background"

Because the world is generated, ``oracle.py`` can read a picture back. Everything is derived from ``(seed, index)``, never from
global state. One scene in ten, chosen by a hash of its attributes, is *held out*: ``sample_scene(split="train")`` never yields it
and ``split="heldout"`` yields nothing else, so evaluation captions are combinations that no model has seen.

Design notes. Objects are saturated and backgrounds are grey, so an object can be found from pixels alone, after blur and JPEG too.
Digits appear alone and not small: below 20 pixels a 4x latent cannot carry them. Objects never touch.
"""

import hashlib
from dataclasses import asdict, dataclass

import numpy as np

SIZE = 64  # pixels, both sides
SUPERSAMPLING = 4

SHAPES = ("circle", "square", "triangle", "cross")
DIGITS = tuple(f"digit {i}" for i in range(10))
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 210, 40),
    "purple": (150, 50, 190),
    "cyan": (40, 200, 210),
}
SIZES = {"small": 14.0, "medium": 22.0, "large": 32.0}  # pixels, the longer side
POSITIONS = {"top left": (20, 20), "top right": (44, 20), "bottom left": (20, 44), "bottom right": (44, 44)}  # centre x, y
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # of the first object, seen from the second
COUNTS = {1: "one", 2: "two", 3: "three"}
BACKGROUNDS = ("plain white", "plain gray", "plain black", "gradient", "striped")

SEVERAL_SIZE = 14.0
RELATION_SIZE = 20.0
_SEVERAL_X = {2: (20, 44), 3: (11, 32, 53)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Single:
    """One object whose size and position are named."""

    shape: str
    colour: str
    size: str
    position: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} in the {self.position} on a {self.background} background"


@dataclass(frozen=True, kw_only=True, slots=True)
class Several:
    """Two or three equal small objects side by side."""

    shape: str
    colour: str
    count: int
    background: str

    @property
    def caption(self) -> str:
        plural = "crosses" if self.shape == "cross" else f"{self.shape}s"
        return f"{COUNTS[self.count]} small {self.colour} {plural} on a {self.background} background"


@dataclass(frozen=True, kw_only=True, slots=True)
class Relation:
    """Two objects of different colours, one beside, above or below the other."""

    shape: str
    colour: str
    relation: str
    other_shape: str
    other_colour: str
    background: str

    @property
    def caption(self) -> str:
        first, second = f"a {self.colour} {self.shape}", f"a {self.other_colour} {self.other_shape}"
        return f"{first} {self.relation} {second} on a {self.background} background"


Scene = Single | Several | Relation


def is_held_out(scene: Scene) -> bool:
    """Whether this combination of attributes is kept away from training (one in ten, by SHA-256 of the attributes)."""
    text = type(scene).__name__ + repr(sorted(asdict(scene).items()))
    return hashlib.sha256(text.encode()).digest()[0] < 26


def _draw_scene(rng: np.random.Generator) -> Scene:
    def pick(values):
        values = tuple(values)
        return values[int(rng.integers(len(values)))]

    kind = rng.random()
    if kind < 0.5:
        if rng.random() < 0.35:
            shape, size = pick(DIGITS), pick(("medium", "large"))
        else:
            shape, size = pick(SHAPES), pick(SIZES)
        return Single(shape=shape, colour=pick(COLOURS), size=size, position=pick(POSITIONS), background=pick(BACKGROUNDS))
    if kind < 0.7:
        return Several(shape=pick(SHAPES), colour=pick(COLOURS), count=pick((2, 3)), background=pick(BACKGROUNDS))
    colour = pick(COLOURS)
    return Relation(
        shape=pick(SHAPES),
        colour=colour,
        relation=pick(RELATIONS),
        other_shape=pick(SHAPES),
        other_colour=pick(c for c in COLOURS if c != colour),
        background=pick(BACKGROUNDS),
    )


def sample_scene(seed: int, index: int, split: str = "train") -> Scene:
    """The scene number ``index`` of stream ``seed``. ``split`` is "train" or "heldout"; the two never share a combination."""
    if split not in ("train", "heldout"):
        raise ValueError(f"sample_scene: split must be 'train' or 'heldout', got {split!r}.")
    rng = np.random.default_rng([seed, index, 0])
    while True:
        scene = _draw_scene(rng)
        if is_held_out(scene) == (split == "heldout"):
            return scene


def captions(num: int, seed: int = 0, split: str = "heldout") -> list[str]:
    """``num`` captions for prompts; held-out combinations unless asked otherwise."""
    return [sample_scene(seed, i, split).caption for i in range(num)]


# --- drawing ---------------------------------------------------------------------------------------------------------

# Seven-segment strokes in a 0.6 x 1 box: x0, y0, x1, y1 with the stroke's thickness 0.18.
_T = 0.18
_SEGMENTS = {
    "a": (0.0, 0.0, 0.6, _T),
    "b": (0.6 - _T, 0.0, 0.6, 0.5 + _T / 2),
    "c": (0.6 - _T, 0.5 - _T / 2, 0.6, 1.0),
    "d": (0.0, 1.0 - _T, 0.6, 1.0),
    "e": (0.0, 0.5 - _T / 2, _T, 1.0),
    "f": (0.0, 0.0, _T, 0.5 + _T / 2),
    "g": (0.0, 0.5 - _T / 2, 0.6, 0.5 + _T / 2),
}
_DIGIT_SEGMENTS = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Membership in ``shape`` of points in the unit box [0, 1]^2 (v downwards)."""
    if shape == "circle":
        return (u - 0.5) ** 2 + (v - 0.5) ** 2 <= 0.25
    if shape == "square":
        return (u >= 0.04) & (u <= 0.96) & (v >= 0.04) & (v <= 0.96)
    if shape == "triangle":
        return (v >= 0) & (v <= 1) & (np.abs(u - 0.5) <= v / 2)
    if shape == "cross":
        return ((np.abs(u - 0.5) <= 0.17) & (v >= 0) & (v <= 1)) | ((np.abs(v - 0.5) <= 0.17) & (u >= 0) & (u <= 1))
    segments = _DIGIT_SEGMENTS[int(shape.removeprefix("digit "))]
    inside = np.zeros_like(u, dtype=bool)
    for name in segments:
        x0, y0, x1, y1 = _SEGMENTS[name]
        inside |= (u - 0.2 >= x0) & (u - 0.2 <= x1) & (v >= y0) & (v <= y1)
    return inside


def coverage(shape: str, centre: tuple[float, float], size: float, canvas: int = SIZE) -> np.ndarray:
    """Antialiased coverage in [0, 1], shape [canvas, canvas], of one object with its longer side ``size`` pixels."""
    n = canvas * SUPERSAMPLING
    grid = (np.arange(n) + 0.5) / SUPERSAMPLING
    u = (grid - centre[0]) / size + 0.5
    v = (grid - centre[1]) / size + 0.5
    inside = np.zeros((n, n), dtype=np.float32)
    cols, rows = np.nonzero(np.abs(u - 0.5) <= 0.5)[0], np.nonzero(np.abs(v - 0.5) <= 0.5)[0]
    if len(cols) and len(rows):
        uu, vv = np.meshgrid(u[cols], v[rows])
        inside[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1] = _inside(shape, uu, vv)
    return inside.reshape(canvas, SUPERSAMPLING, canvas, SUPERSAMPLING).mean(axis=(1, 3))


def background_tone(background: str) -> np.ndarray:
    """Grey values in [0, 255], shape [SIZE, SIZE]."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    if background == "gradient":
        return 30.0 + 195.0 * y / (SIZE - 1)
    if background == "striped":
        return np.where((x // 8) % 2 == 0, 80.0, 190.0)
    return np.full((SIZE, SIZE), {"plain white": 240.0, "plain gray": 128.0, "plain black": 16.0}[background])


def layout(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str, tuple[float, float], float]]:
    """Objects of the scene as (shape, colour, centre, size), with a jitter of a few pixels drawn from ``rng``."""

    def near(x: float, y: float, dx: float, dy: float) -> tuple[float, float]:
        return (x + rng.uniform(-dx, dx), y + rng.uniform(-dy, dy))

    if isinstance(scene, Single):
        return [(scene.shape, scene.colour, near(*POSITIONS[scene.position], 2, 2), SIZES[scene.size])]
    if isinstance(scene, Several):
        y = rng.uniform(22, 42)
        return [(scene.shape, scene.colour, near(x, y, 1, 1), SEVERAL_SIZE) for x in _SEVERAL_X[scene.count]]
    dx, dy = RELATIONS[scene.relation]
    jitter = (2, 5) if dx else (5, 2)
    first, second = near(32 + 15 * dx, 32 + 15 * dy, *jitter), near(32 - 15 * dx, 32 - 15 * dy, *jitter)
    return [
        (scene.shape, scene.colour, first, RELATION_SIZE),
        (scene.other_shape, scene.other_colour, second, RELATION_SIZE),
    ]


def render(scene: Scene, seed: int = 0, index: int = 0) -> np.ndarray:
    """Paint the scene: uint8 RGB [64, 64, 3]. ``(seed, index)`` fixes the jitter."""
    rng = np.random.default_rng([seed, index, 1])
    picture = np.repeat(background_tone(scene.background)[..., None], 3, axis=2)
    for shape, colour, centre, size in layout(scene, rng):
        alpha = coverage(shape, centre, size)[..., None]
        picture = picture * (1 - alpha) + np.asarray(COLOURS[colour], dtype=np.float32) * alpha
    return np.rint(picture).astype(np.uint8)


_SCENE_OF_CAPTION: dict[str, Scene] = {}


def parse_caption(caption: str) -> Scene:
    """The scene that a caption of this grammar describes. Raises ``ValueError`` for any other text."""
    if not _SCENE_OF_CAPTION:
        for scene in _all_scenes():
            _SCENE_OF_CAPTION[scene.caption] = scene
    try:
        return _SCENE_OF_CAPTION[caption]
    except KeyError:
        raise ValueError(
            f"parse_caption: caption must follow the grammar of pipelines/tiny/scenes.py, got {caption!r}. "
            "Use captions(num) to draw some."
        ) from None


def _all_scenes():
    for background in BACKGROUNDS:
        for colour in COLOURS:
            for shape in SHAPES + DIGITS:
                for size in SIZES:
                    for position in POSITIONS:
                        yield Single(shape=shape, colour=colour, size=size, position=position, background=background)
            for shape in SHAPES:
                for count in (2, 3):
                    yield Several(shape=shape, colour=colour, count=count, background=background)
                for relation in RELATIONS:
                    for other_shape in SHAPES:
                        for other_colour in COLOURS:
                            yield Relation(
                                shape=shape,
                                colour=colour,
                                relation=relation,
                                other_shape=other_shape,
                                other_colour=other_colour,
                                background=background,
                            )
