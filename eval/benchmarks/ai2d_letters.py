"""The letters that AI2D draws on its diagrams: for which questions, and how.

AI2D's annotations give every text of a diagram a letter ("replacementText"), and say of a question whether it is about
such letters. The rules are those of `scripts/AI2D_preproc.ipynb` of https://github.com/open-compass/VLMEvalKit, which
made the tables AI2D_TEST and AI2D_TEST_NO_MASK; its font (Times bold) is not free, so the letters here are those of
Pillow's own font. pix2struct draws letters for every question that the annotations call one about letters.
"""

from __future__ import annotations

import io
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import ImageDraw, ImageFont

from defocus_mllm.images import load_image
from eval.benchmarks.official import field
from eval.files import read_json
from eval.metrics.vqa import without_punctuation

Style = Literal["masked", "no_mask"]
DRAWING = "1"
"""Version of the drawing: to be raised with every change of it, for drawn images are kept."""

_WORDS_FOR_LETTERS = ("{}", "Both", "None of above")
_BRIGHT = 127
_TRIAL_SIZE = 100


def has_letters(question: str, choices: Sequence[str], about_letters: bool) -> bool:
    """Whether the question's image gets letters.

    The annotations must say so (`about_letters`), and at least three of the four choices be letters, or the question
    hold one: many questions that the annotations call so are about the texts themselves. "a" is one, the article too.
    """
    if not about_letters:
        return False
    single = any(word in string.ascii_letters for word in without_punctuation(question).split() if len(word) == 1)
    return single or sum(map(_is_letter, choices)) >= 3


def _is_letter(choice: str) -> bool:
    """Whether a choice names letters: "A", "A and B", "Stage C", "A, B"; whatever has two characters is one."""
    if len(choice) <= 2 or choice in _WORDS_FOR_LETTERS or (choice.startswith("Stage ") and _is_letter(choice[6:])):
        return True
    if " and " in choice and all(map(_is_letter, choice.split(" and "))):
        return True
    words = without_punctuation(choice).split()
    return len(words) > 1 and all(map(_is_letter, words))


def draw_letters(image: Path, annotation: Path, style: Style) -> bytes:
    """The diagram with its letters, as a PNG file.

    Args:
        image: the diagram.
        annotation: `annotations/NAME.json`, whose `text` maps names to {"rectangle", "replacementText"}.
        style: "masked" covers each text with a white box that holds the letter; "no_mask" frames it and puts the letter
            above it, or below where there is no room.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: no image, or a malformed annotation; the message names file and text.
    """
    picture = load_image(image)
    texts = field(read_json(annotation), ("text",), str(annotation))
    labels = [_read(label, f"{annotation}, text {name!r}") for name, label in texts.items()]
    canvas = ImageDraw.Draw(picture)
    if style == "masked":
        for box, letter in labels:
            _cover(canvas, box, letter)
    elif labels:
        dark = np.asarray(picture.convert("L")).mean() < _BRIGHT
        height = sum(bottom - top for (_, top, _, bottom), _ in labels) / len(labels)
        for box, letter in labels:
            _frame(canvas, box, letter, height, "white" if dark else "black")
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""


def _read(label: Mapping[str, Any], where: str) -> tuple[Box, str]:
    corners, letter = field(label, ("rectangle",), where), field(label, ("replacementText",), where)
    try:
        (x0, y0), (x1, y1) = corners
        return (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), str(letter)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: 'rectangle' must hold two corners, found {corners!r}") from error


def _cover(canvas: ImageDraw.ImageDraw, box: Box, letter: str) -> None:
    """A white box with the letter in its middle, as large as fits."""
    left, top, right, bottom = box
    canvas.rectangle(box, fill="white")
    x0, y0, x1, y1 = canvas.textbbox((0, 0), letter, font=_font(_TRIAL_SIZE))
    size = _TRIAL_SIZE * min((right - left) / max(x1 - x0, 1), (bottom - top) / max(y1 - y0, 1))
    _write(canvas, ((left + right) / 2, (top + bottom) / 2), letter, size, "black")


def _frame(canvas: ImageDraw.ImageDraw, box: Box, letter: str, height: float, colour: str) -> None:
    """A frame of two pixels, and the letter one `height` above its upper edge, or below the lower one."""
    left, top, right, bottom = box
    for grown in range(2):
        canvas.rectangle((left - grown, top - grown, right + grown, bottom + grown), outline=colour)
    middle = top - 0.75 * height if top >= 1.2 * height else bottom + 0.75 * height
    _write(canvas, ((left + right) / 2, middle), letter, height, colour)


def _write(canvas: ImageDraw.ImageDraw, centre: tuple[float, float], letter: str, size: float, colour: str) -> None:
    """The letter with the middle of its ink at `centre`."""
    font = _font(max(size, 1.0))
    x0, y0, x1, y1 = canvas.textbbox((0, 0), letter, font=font)
    canvas.text((centre[0] - (x0 + x1) / 2, centre[1] - (y0 + y1) / 2), letter, font=font, fill=colour)


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
