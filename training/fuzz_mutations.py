"""Damage for `training.fuzz`: records and pictures, and what random hands make of them."""

from __future__ import annotations

import base64
import copy
import io
import json
import random
from typing import Any

import numpy
from PIL import Image

TEXTS = ("what color is the shape?", "is there a red circle in the image?", "a blue rectangle", "yes", "¿qué? 図")
_NASTY_TEXTS = (
    *("", " \n", "<image>", "<image><image>", "</s>", "<s>", "<unk>", "<|im_end|>", "ASSISTANT:", "<|assistant|>"),
    *("\0", "\ud800", "\u2028", "\ufeff", "🙂" * 50, "ab " * 700, "\\", "%s{0}", "[[", "\ue000text\ue001"),
)
_NASTY_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1e308, float("nan"), float("inf"), 10**30, [], {}, [[]], [None], {"": ""}, {"type": "image"}),
    *(["human", "gpt"], {"from": "human"}, {"url": "x"}, [{"type": "text"}], [{"type": "image_url", "image_url": {}}]),
)
_PATHS = (
    *(
        "a.png",
        "b.jpg",
        "../secret.png",
        "/etc/passwd",
        "a\\b.png",
        "gone.png",
        "http://host/a.png",
        "file:///etc/passwd",
    ),
    *("a.png\0", "a.png/", ".", "", "data:image/png;base64,AAAA", "data:,", "x" * 5000, "A.PNG", "./a.png", "link.png"),
)
_KEYS = (
    "id",
    "image",
    "images",
    "conversations",
    "messages",
    "from",
    "value",
    "role",
    "content",
    "type",
    "text",
    "url",
)
_SAID = ("value", "text", "content")
_ROLES = ("human", "gpt", "user", "assistant", "system", "tool", "HUMAN", "")


def base_records() -> list[dict[str, Any]]:
    """One good record of each known shape; their pictures are `a.png` and `b.jpg`."""

    def llava(*values: str) -> list[dict[str, Any]]:
        return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]

    url = "data:image/png;base64," + base64.b64encode(_saved(_picture("RGB"), "PNG")).decode()
    parts = [
        {"type": "text", "text": TEXTS[0]},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image", "image": "b.jpg"},
    ]
    return [
        {"id": 1, "image": "a.png", "conversations": llava("<image>\n" + TEXTS[0], "red", TEXTS[1], "yes")},
        {"id": "00453", "image": "b.jpg", "conversations": llava(TEXTS[0] + "\n<image>", TEXTS[2])},
        {"id": "wgByO4Y_0", "model": "", "conversations": llava(*TEXTS[:4])},
        {"image": ["a.png", "b.jpg"], "conversations": llava("<image> or <image>?", "both")},
        {"messages": [{"role": "system", "content": "brief"}, {"role": "user", "content": parts}, _assistant("no")]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, _assistant("red")], "images": ["a.png"]},
    ]


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def mutated_line(record: dict[str, Any], draw: random.Random) -> bytes:
    """A line of JSON Lines: the record with one to three changes of its values, its order, or its bytes."""
    record = copy.deepcopy(record)
    damage_bytes = draw.random() < 0.15
    for _ in range(draw.choice((0, 1) if damage_bytes else (1, 1, 1, 2, 3))):
        if draw.random() < 0.5:
            _change_text(record, draw)
        else:
            _change(record, draw)
    line = json.dumps(record, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    if draw.random() < 0.01:
        line = b"[" * 3000 + line
    if damage_bytes:
        line = damaged(line, draw)
    return line.replace(b"\n", b" ").replace(b"\r", b" ").strip() or b"{}"


def _change(record: dict[str, Any], draw: random.Random) -> None:
    """Change anything, anywhere in the record."""
    places = list(_places(record))
    container, key = draw.choice(places) if places else (record, "id")
    value = container[key] if places else None
    kind = draw.randrange(8)
    if kind == 0:
        del container[key]
    elif kind == 1:
        container[key] = copy.deepcopy(draw.choice(_NASTY_VALUES))
    elif kind == 2 and isinstance(value, str):
        at = draw.randint(0, len(value))
        container[key] = value[:at] + draw.choice(_NASTY_TEXTS) + value[at:]
    elif kind == 3:
        container[key] = draw.choice((*_NASTY_TEXTS, *_ROLES))
    elif kind == 4:
        record[draw.choice(("image", "images"))] = draw.choice((draw.choice(_PATHS), draw.choices(_PATHS, k=2)))
    elif kind == 5 and isinstance(value, list):
        if draw.random() < 0.5:
            draw.shuffle(value)
        else:
            value.extend(copy.deepcopy(draw.choices([*value, *_NASTY_VALUES], k=draw.choice((1, 2, 100)))))
    elif kind == 6 and isinstance(container, dict):
        container[draw.choice(_KEYS)] = container.pop(key)
    else:
        other, other_key = draw.choice(places) if places else (record, "id")
        container[key] = copy.deepcopy(other[other_key])


def _change_text(record: dict[str, Any], draw: random.Random) -> None:
    """Write something into what one side says."""
    places = [
        (container, key) for container, key in _places(record) if key in _SAID and isinstance(container[key], str)
    ]
    if places:
        container, key = draw.choice(places)
        text = container[key]
        at = draw.choice((0, len(text), draw.randint(0, len(text))))
        container[key] = text[:at] + draw.choice(_NASTY_TEXTS) + text[at:]


def _places(value: Any, depth: int = 0) -> Any:
    """(container, key) of every value in a record."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        if depth < 6:
            yield from _places(inner, depth + 1)


def base_pictures() -> dict[str, bytes]:
    """Small pictures of every kind that data sets hold, by name."""
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [_picture("P"), _picture("P").rotate(90)]
    rgba = _picture("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    deep = numpy.arange(40 * 24, dtype=numpy.uint16).reshape(24, 40) * 60
    return {
        "rgb.jpg": _saved(_picture("RGB"), "JPEG"),
        "grey.jpg": _saved(_picture("L"), "JPEG"),
        "cmyk.jpg": _saved(_picture("CMYK"), "JPEG"),
        "progressive.jpg": _saved(_picture("RGB"), "JPEG", progressive=True, exif=exif),
        "rgb.png": _saved(_picture("RGB"), "PNG"),
        "alpha.png": _saved(rgba, "PNG"),
        "grey_alpha.png": _saved(rgba.convert("LA"), "PNG"),
        "palette.png": _saved(_picture("P"), "PNG", transparency=3),
        "deep.png": _saved(Image.fromarray(deep), "PNG"),
        "animated.gif": _saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "lossy.webp": _saved(rgba, "WEBP"),
        "animated.webp": _saved(frames[0].convert("RGB"), "WEBP", save_all=True, append_images=[rgba.convert("RGB")]),
        "plain.bmp": _saved(_picture("RGB"), "BMP"),
        "deflate.tiff": _saved(_picture("RGB"), "TIFF", compression="tiff_deflate"),
        "lzw.tiff": _saved(_picture("CMYK"), "TIFF", compression="tiff_lzw"),
        "plain.ppm": _saved(_picture("RGB"), "PPM"),
        "small.ico": _saved(rgba.resize((16, 16)), "ICO", sizes=[(16, 16)]),
        "one_pixel.png": _saved(_picture("RGB").resize((1, 1)), "PNG"),
        "thread.png": _saved(_picture("RGB").resize((1, 900)), "PNG"),
    }


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The bytes with one kind of damage: some overwritten, cut off, cut out, doubled, zeroed, or inserted."""
    damage = bytearray(content)
    kind = draw.randrange(7)
    start = draw.randrange(len(damage))
    length = min(draw.choice((1, 4, 40, 400)), len(damage) - start)
    if kind == 0:
        for _ in range(draw.choice((1, 3, 30))):
            damage[draw.randrange(len(damage))] = draw.randrange(256)
    elif kind == 1:  # the head, where sizes and kinds stand
        for _ in range(draw.choice((1, 2, 6))):
            damage[draw.randrange(min(64, len(damage)))] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
    elif kind == 2:
        del damage[start:]
    elif kind == 3:
        del damage[start : start + length]
    elif kind == 4:
        damage[start:start] = damage[start : start + length] * draw.choice((1, 20))
    elif kind == 5:
        damage[start : start + length] = bytes(length)
    else:
        damage[start:start] = draw.randbytes(length)
    return bytes(damage)


def _picture(mode: str) -> Image.Image:
    noise = numpy.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=numpy.uint8)
    return Image.fromarray(noise).resize((40, 24)).convert(mode)


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()
