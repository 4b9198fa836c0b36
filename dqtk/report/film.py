"""A clip as one lossless picture: its frames in a sheet, row by row, about as many down as across.

That is what a page or a row of a comparison can carry without a codec: H.264 at diffusers' default quality is itself 35 to 37 dB
away from the frames that it was given, so it hides small errors and caps what a near-lossless method can show.
"""

import io
import math
from collections.abc import Sequence

from PIL import Image


def noun_of(num_frames: int, still: str = "image") -> str:
    """What people call it: a "clip", or the word for one that stands still."""
    return "clip" if num_frames > 1 else still


def columns_of(num_frames: int) -> int:
    """Frames per row of the sheet."""
    return math.ceil(math.sqrt(num_frames))


def sheet_of(frames: Sequence[Image.Image]) -> Image.Image:
    """All frames (of one size) in one picture; a single one is itself. What is left of the last row is black."""
    if len(frames) == 1:
        return frames[0]
    width, height = frames[0].size
    columns = columns_of(len(frames))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(frames) / columns) * height))
    for number, frame in enumerate(frames):
        sheet.paste(frame, (number % columns * width, number // columns * height))
    return sheet


def frame_size(sheet: tuple[int, int], num_frames: int) -> tuple[int, int]:
    """(width, height) of a frame, from the sheet's."""
    columns = columns_of(num_frames)
    return sheet[0] // columns, sheet[1] // math.ceil(num_frames / columns)


def frames_of(sheet: Image.Image, num_frames: int) -> tuple[Image.Image, ...]:
    """The frames of a sheet of so many."""
    columns = columns_of(num_frames)
    width, height = frame_size(sheet.size, num_frames)
    places = [(number % columns * width, number // columns * height) for number in range(num_frames)]
    return tuple(sheet.crop((x, y, x + width, y + height)) for x, y in places)


def png_of(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def frames_of_png(png: bytes, num_frames: int) -> tuple[Image.Image, ...]:
    """The frames of a sheet that is a PNG file."""
    with Image.open(io.BytesIO(png)) as image:
        return frames_of(image.convert("RGB"), num_frames)
