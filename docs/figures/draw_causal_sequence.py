"""Draw the figure of the causal sequence, for light and dark pages: `python docs/figures/draw_causal_sequence.py`."""

from __future__ import annotations

from html import escape
from pathlib import Path

WIDTH, HEIGHT = 1000, 420
GRID = 3  # the picture is cut into GRID x GRID patches
WORDS = ["what", "color", "is", "it", "?"]
ANSWER = "red"
TILE, PITCH, WORD_PITCH = 34, 38, 52
LEFT, WORDS_LEFT = 20, 412
MASK_LEFT, MASK_TOP, CELL = 736, 76, 17

LIGHT = {
    "ink": "#1f2328",
    "quiet": "#59636e",
    "line": "#8c959f",
    "paper": "#f6f8fa",
    "patch": "#dbe9fb",
    "patch_edge": "#2f6fbd",
    "class": "#2f6fbd",
    "class_ink": "#ffffff",
    "word": "#fdebd3",
    "word_edge": "#b8690f",
    "both": "#cfc3e8",
    "masked": "#eceff2",
    "sky": "#ffffff",
    "shape": "#d1322d",
}
DARK = {
    "ink": "#f0f6fc",
    "quiet": "#9198a1",
    "line": "#6e7681",
    "paper": "#161b22",
    "patch": "#1b3a63",
    "patch_edge": "#6cabf7",
    "class": "#6cabf7",
    "class_ink": "#0d1117",
    "word": "#5a3a10",
    "word_edge": "#e8a04c",
    "both": "#55447f",
    "masked": "#1c222a",
    "sky": "#e6edf3",
    "shape": "#d1322d",
}


def box(x: float, y: float, width: float, height: float, fill: str, edge: str, radius: float = 4) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" '
        f'fill="{fill}" stroke="{edge}" stroke-width="1.2"/>'
    )


def text(
    x: float, y: float, content: str, fill: str, size: float = 13, anchor: str = "middle", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{fill}"{weight}'
    return f'<text x="{x}" y="{y}" {style}>{escape(content)}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{color}" stroke-width="1.4" marker-end="url(#head)"/>'
    )


def picture(colors: dict[str, str], size: int = 96) -> str:
    return (
        f'<rect width="{size}" height="{size}" fill="{colors["sky"]}"/>'
        f'<circle cx="{size * 0.54}" cy="{size * 0.5}" r="{size * 0.3}" fill="{colors["shape"]}"/>'
    )


def draw_pixels(colors: dict[str, str]) -> list[str]:
    """The picture with its reading order, then its patches in a row, and the class token behind them."""
    side = 96 // GRID
    parts = [f'<svg x="{LEFT}" y="16" width="96" height="96">{picture(colors)}</svg>']
    for line in range(1, GRID):
        parts.append(f'<path d="M{LEFT} {16 + line * side}h96M{LEFT + line * side} 16v96" stroke="{colors["line"]}"/>')
    parts.append(f'<rect x="{LEFT}" y="16" width="96" height="96" fill="none" stroke="{colors["line"]}"/>')
    middle = [16 + side * (row + 0.5) for row in range(GRID)]
    path = "".join(
        f"M{LEFT + 9} {y}H{LEFT + 84}" + (f"L{LEFT + 9} {middle[row + 1]}" if row + 1 < GRID else "")
        for row, y in enumerate(middle)
    )
    parts.append(f'<path d="{path}" fill="none" stroke="#1f2328" stroke-width="1.4" marker-end="url(#reading)"/>')
    parts.append(text(LEFT + 112, 60, "pixels, read like a line of text:", colors["ink"], 14, "start", True))
    parts.append(
        text(LEFT + 112, 80, "left to right, top to bottom, the class token last", colors["quiet"], 13, "start")
    )
    for index in range(GRID * GRID):
        row, column = divmod(index, GRID)
        x = LEFT + index * PITCH
        crop = f"{column * side} {row * side} {side} {side}"
        parts.append(f'<svg x="{x}" y="148" width="{TILE}" height="{TILE}" viewBox="{crop}">{picture(colors)}</svg>')
        parts.append(box(x, 148, TILE, TILE, "none", colors["patch_edge"], 0))
        parts.append(text(x + TILE / 2, 141, f"p{index + 1}", colors["quiet"], 12))
    x = LEFT + GRID * GRID * PITCH
    parts.append(box(x, 148, TILE, TILE, colors["class"], colors["class"]))
    parts.append(text(x + TILE / 2, 170, "cls", colors["class_ink"], 13, bold=True))
    return parts


def draw_models(colors: dict[str, str]) -> list[str]:
    """Encoder, projector, words, language model, answer."""
    image_width = (GRID * GRID + 1) * PITCH - (PITCH - TILE)
    right = WORDS_LEFT + len(WORDS) * WORD_PITCH - 6
    middle = LEFT + image_width / 2
    parts = [
        arrow(middle, 186, middle, 204, colors["line"]),
        box(LEFT, 208, image_width, 32, colors["patch"], colors["patch_edge"]),
        text(middle, 229, "De-focus encoder, causal", colors["ink"], 14, bold=True),
        arrow(middle, 244, middle, 262, colors["line"]),
        box(LEFT, 266, image_width, 28, colors["paper"], colors["line"]),
        text(middle, 285, "projector", colors["ink"]),
        arrow(middle, 298, middle, 316, colors["line"]),
        text(WORDS_LEFT, 257, "then the words", colors["ink"], 14, "start", True),
        box(LEFT, 320, right - LEFT, 34, colors["paper"], colors["ink"]),
        text((LEFT + right) / 2, 342, "decoder-only language model, causal", colors["ink"], 14, bold=True),
    ]
    for index, word in enumerate(WORDS):
        x = WORDS_LEFT + index * WORD_PITCH
        parts.append(box(x, 266, WORD_PITCH - 6, 28, colors["word"], colors["word_edge"]))
        parts.append(text(x + (WORD_PITCH - 6) / 2, 285, word, colors["ink"]))
        parts.append(arrow(x + (WORD_PITCH - 6) / 2, 298, x + (WORD_PITCH - 6) / 2, 316, colors["line"]))
    x = right - (WORD_PITCH - 6)
    parts.append(arrow(x + (WORD_PITCH - 6) / 2, 358, x + (WORD_PITCH - 6) / 2, 374, colors["line"]))
    parts.append(box(x, 378, WORD_PITCH - 6, 28, colors["word"], colors["word_edge"]))
    parts.append(text(x + (WORD_PITCH - 6) / 2, 397, ANSWER, colors["ink"], bold=True))
    return parts


def draw_mask(colors: dict[str, str]) -> list[str]:
    """The causal mask of the whole sequence: a row is a token that looks, a column a token that is looked at."""
    images = GRID * GRID + 1
    count = images + len(WORDS)
    parts = [
        text(MASK_LEFT + count * CELL / 2, 32, "one causal mask over both", colors["ink"], 14, bold=True),
        text(MASK_LEFT + count * CELL / 2, 52, "each token sees itself and what came before", colors["quiet"], 12.5),
    ]
    for row in range(count):
        for column in range(count):
            if column > row:
                fill = colors["masked"]
            elif column == images - 1 or row == images - 1:
                fill = colors["class"]
            elif row < images:
                fill = colors["patch_edge"] + "99"
            else:
                fill = colors["both"] if column < images else colors["word_edge"] + "bb"
            x, y = MASK_LEFT + column * CELL, MASK_TOP + row * CELL
            parts.append(f'<rect x="{x}" y="{y}" width="{CELL - 1.5}" height="{CELL - 1.5}" rx="2" fill="{fill}"/>')
    bottom = MASK_TOP + count * CELL
    for name, first, last in (("pixels", 0, images - 1), ("cls", images - 1, images), ("words", images, count)):
        center = (first + last) * CELL / 2
        color = {"pixels": colors["patch_edge"], "cls": colors["class"], "words": colors["word_edge"]}[name]
        parts.append(text(MASK_LEFT + center, bottom + 18, name, color, 13, bold=True))
        parts.append(text(MASK_LEFT - 8, MASK_TOP + center + 4, name, color, 13, "end", bold=True))
    parts.append(
        text(
            MASK_LEFT + count * CELL / 2,
            bottom + 46,
            "the class token comes after the whole image,",
            colors["quiet"],
            12.5,
        )
    )
    parts.append(text(MASK_LEFT + count * CELL / 2, bottom + 63, "and every word sees it", colors["quiet"], 12.5))
    return parts


def draw(colors: dict[str, str]) -> str:
    """The whole figure as SVG, on a transparent ground."""
    markers = "".join(
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{color}"/></marker>'
        for name, color in (("head", colors["line"]), ("reading", "#1f2328"))
    )
    description = (
        "Patches p1 to p9 and the class token pass a causal encoder and a projector, then words follow; one mask."
    )
    parts = [*draw_pixels(colors), *draw_models(colors), *draw_mask(colors)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif" role="img">\n'
        f"<title>Vision and language as one causal sequence</title>\n<desc>{description}</desc>\n"
        f"<defs>{markers}</defs>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> None:
    folder = Path(__file__).parent
    for name, colors in (("causal_sequence.svg", LIGHT), ("causal_sequence_dark.svg", DARK)):
        (folder / name).write_text(draw(colors), encoding="utf-8")


if __name__ == "__main__":
    main()
