"""The gallery of the report: samples with what was seen, asked, said and true."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from eval.metrics.multiple_choice import LETTERS
from eval.report_data import Report
from eval.samples import labels_of

_FORMATS_OF_BROWSERS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")
_LONGEST_SIDE = 1024
"""Pixels: a larger image is reduced to that. 120 scanned pages as they are would make a page of 100 MB and more."""
_PIXEL_ART = 128
"""Pixels: an image with no side longer than that is enlarged without blurring."""
_MARKS = {"right": "✓", "partly right": "◑", "wrong": "✗"}


def gallery(report: Report) -> str:
    """The filters, and a card for each sample; errors as `_data_uri`."""
    shown_wrong = sum(sample["score"] != 1 for sample in report.gallery)
    shown_right = len(report.gallery) - shown_wrong
    kinds = sorted({kind for sample in report.gallery for kind in _kinds(sample)})
    options = "".join(f"<option>{escape(kind)}</option>" for kind in kinds)
    names = dict.fromkeys(name for sample in report.gallery for name in sample["images"])
    images = {name: _image(report.image_root, name) for name in names}
    cards = "".join(_card(sample, images) for sample in report.gallery)
    size = "small" if all("class='pixels'" in image for image in images.values()) else "large"
    return (
        f"<p>Shown: {shown_wrong} of {report.wrong:,} wrong answers, {shown_right} of {report.right:,} right ones, "
        "drawn at random. A click enlarges an image.</p>"
        "<p class='filter'><label>answer <select id='outcome'><option>all</option><option>wrong</option>"
        "<option>partly right</option><option>right</option></select></label> "
        f"<label>kind <select id='kind'><option>all</option>{options}</select></label> "
        "<label>text <input id='words' type='search' placeholder='question, answer or truth'></label> "
        f"<output id='shown'></output></p><div class='gallery {size}'>{cards}</div>"
    )


def _kinds(sample: Mapping[str, Any]) -> list[str]:
    return sorted(label for category in sample["categories"].values() for label in labels_of(category))


def _card(sample: Mapping[str, Any], images: Mapping[str, str]) -> str:
    outcome = _outcome(sample["score"])
    kinds = json.dumps(_kinds(sample))
    pictures = "".join(images[name] for name in sample["images"])
    said = sample["text"].strip()
    choices = "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, sample.get("choices", ()), strict=False)
    )
    lines = [
        ("question", escape(sample["question"])),
        ("choices", escape(choices)),
        ("answer", f"{_MARKS[outcome]} {escape(said) or '<i>nothing</i>'}"),
        ("truth", escape(_reading(sample["parsed"], said))),
        ("truth", f"truth: {escape(_truth(sample))}"),
        ("truth", f"score: {sample['score']:.3g}"),
    ]
    texts = "".join(f"<p class='{name}'>{text}</p>" for name, text in lines if text)
    style = outcome.split()[0]
    return f"<article class='{style}' data-outcome='{outcome}' data-kinds='{escape(kinds)}'>{pictures}{texts}</article>"


def _outcome(score: float) -> str:
    if score == 1:
        return "right"
    return "partly right" if score > 0 else "wrong"


def _reading(parsed: object, said: str) -> str:
    """What the official reading made of an answer, where that is not what was said."""
    if parsed is None:
        return "not readable" if said else ""
    return "" if str(parsed) == said else f"read as: {parsed}"


def _truth(sample: Mapping[str, Any]) -> str:
    """The target or, where people answered differently, every answer and how many gave it."""
    answers = Counter(map(str, sample.get("answers") or [sample["target"]])).most_common()
    return ", ".join(answer if count == 1 else f"{answer} ({count})" for answer, count in answers)


def _image(root: Path, name: str) -> str:
    """An image of the benchmark inside the page; no other file may enter one that is made to be passed on.

    Raises:
        ValueError: it lies elsewhere, or is no image.
        FileNotFoundError: it is missing.
    """
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ValueError(f"samples.jsonl: image {name!r} lies outside the images of the benchmark in {root}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: the report needs the images of the benchmark")
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS_OF_BROWSERS) as image:
            media_type, longest = Image.MIME[str(image.format)], max(image.size)
            if longest > _LONGEST_SIDE:
                media_type, content = "image/jpeg", _reduced(image)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not an image ({', '.join(_FORMATS_OF_BROWSERS)})") from error
    style = " class='pixels'" if longest <= _PIXEL_ART else ""
    uri = f"data:{media_type};base64,{base64.b64encode(content).decode()}"
    return f"<img{style} alt='{escape(name)}' src='{uri}'>"


def _reduced(image: Image.Image) -> bytes:
    upright = ImageOps.exif_transpose(image).convert("RGB")
    upright.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    file = io.BytesIO()
    upright.save(file, "JPEG", quality=85)
    return file.getvalue()
