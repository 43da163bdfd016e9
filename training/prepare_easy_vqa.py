"""Write the official TRAIN split of easy-VQA (the `easy-vqa` package) as training data in common formats.

    python -m training.prepare_easy_vqa --output data/easy_vqa

The folder it makes:

    images/train/<id>.png         the 64x64 pictures, copied
    images/train/metadata.jsonl   Hugging Face ImageFolder convention, one line an image: its attributes (stage 0)
    captions.json                 LLaVA format, one caption an image (stage 1)
    conversations.json            LLaVA format, all questions of an image as one conversation (stage 2)
    dialogues.json                LLaVA format without images: a caption as text, a few of its image's questions and
                                  their answers (tokenizer and language warm-up, stage 0)
    data.json                     counts, what was missing, sha256 fingerprints; its presence means complete

Labels and captions are derived from the training questions and answers alone: what they do not decide stays unknown.
The test split is not opened. The result is the same on every run, appears all at once (built beside the target, then
renamed), and a second run verifies the fingerprints and changes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from defocus_mllm.console import run_script
from defocus_mllm.files import PARTIAL_PREFIX, file_sha256, write_text_atomically

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
ATTRIBUTES = SHAPES + COLORS
CAPTION_REQUEST = "Describe the image."
PAIRS_IN_A_DIALOGUE = 4
FORMAT_VERSION = 2
_NEGATIONS = {"not", "no"}
_SUMMARY = "data.json"
_TEXT_FILES = ("captions.json", "conversations.json", "dialogues.json", "images/train/metadata.jsonl")


@dataclass
class TrainingImage:
    """One picture of the train split with everything that was asked about it."""

    identifier: int
    path: Path
    turns: list[tuple[str, str]] = field(default_factory=list)
    labels: dict[str, int | None] = field(default_factory=dict)
    caption: str | None = None


def prepare(output: str | Path) -> dict[str, Any]:
    """Write the data set to `output` and return the content of its data.json.

    Returns at once if `output` already holds it, complete and unchanged. Raises ValueError if `output` holds
    something else, is incomplete, or was changed since; ModuleNotFoundError is turned into a ValueError that names
    the package to install.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        return _verify_existing(output)
    images, unparsed = read_train_split()
    output.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f"{PARTIAL_PREFIX}{output.name}-", dir=output.parent))
    try:
        summary = _write_all(images, unparsed, building)
        building.chmod(0o755)  # mkdtemp makes it private
        os.replace(building, output)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return summary


def read_train_split() -> tuple[list[TrainingImage], list[str]]:
    """The train split of the installed package, ordered by image number, and the questions the label rules do not
    cover.

    Raises ValueError if the package is missing, an image of a question is missing, or two questions contradict each
    other.
    """
    try:
        from easy_vqa import get_train_image_paths, get_train_questions
    except ModuleNotFoundError as error:
        raise ValueError("the package easy-vqa is not installed; pip install easy-vqa==1.0 brings it") from error
    paths = get_train_image_paths()
    images = {identifier: TrainingImage(identifier, Path(path)) for identifier, path in sorted(paths.items())}
    for question, answer, identifier in zip(*get_train_questions(), strict=True):
        if identifier not in images:
            raise ValueError(
                f"easy-vqa train question {question!r}: image {identifier} is not in the package; reinstall it"
            )
        images[identifier].turns.append((question, answer))
    unparsed: list[str] = []
    for image in images.values():
        image.labels, not_covered = derive_labels(image.turns, f"easy-vqa train image {image.identifier}")
        image.caption = caption_from_labels(image.labels)
        unparsed += not_covered
    return list(images.values()), unparsed


def derive_labels(turns: Iterable[tuple[str, str]], name: str) -> tuple[dict[str, int | None], list[str]]:
    """What question/answer pairs say about one image: 1 (has it), 0 (has it not) or None (not decided), an entry an
    attribute.

    A "what" question asserts its answer and whatever attribute it presupposes ("what is the blue shape?"); a yes/no
    question asserts or denies the attribute it names. An image shows one shape in one colour, so a known value denies
    the others of its kind and the last value not denied is the known one. The second result lists the questions these
    rules do not cover. Raises ValueError naming the image if two pairs contradict each other.
    """
    labels: dict[str, int | None] = dict.fromkeys(ATTRIBUTES)
    not_covered = []
    for question, answer in turns:
        words = question.lower().rstrip("?").split()
        evidence = dict.fromkeys((word for word in words if word in ATTRIBUTES), 1)
        if words[:1] == ["what"] and answer in ATTRIBUTES:
            evidence[answer] = 1
        elif answer in ("yes", "no") and len(evidence) == 1:
            affirmed = (answer == "yes") != bool(_NEGATIONS & set(words))
            evidence = dict.fromkeys(evidence, int(affirmed))
        else:
            not_covered.append(question)
            continue
        for attribute, value in evidence.items():
            _set_label(labels, attribute, value, name)
    for kind in (SHAPES, COLORS):
        _complete_kind(labels, kind, name)
    return labels, not_covered


def _set_label(labels: dict[str, int | None], attribute: str, value: int, name: str) -> None:
    if labels[attribute] not in (None, value):
        raise ValueError(f"{name}: its questions assert and deny {attribute!r}; the package is damaged, reinstall it")
    labels[attribute] = value


def _complete_kind(labels: dict[str, int | None], kind: tuple[str, ...], name: str) -> None:
    """Use that exactly one attribute of a kind holds."""
    open_attributes = [attribute for attribute in kind if labels[attribute] is None]
    known = [attribute for attribute in kind if labels[attribute] == 1]
    if not known and len(open_attributes) == 1:
        known = open_attributes
        labels[known[0]] = 1
    if known:
        for attribute in kind:
            if attribute != known[0]:
                _set_label(labels, attribute, 0, name)


def caption_from_labels(labels: dict[str, int | None]) -> str | None:
    """What the labels decide: "a red circle", "a circle", "a red shape", or None for nothing."""
    shape = next((attribute for attribute in SHAPES if labels[attribute] == 1), None)
    color = next((attribute for attribute in COLORS if labels[attribute] == 1), None)
    if shape is None and color is None:
        return None
    return " ".join(["a", *([color] if color else []), shape or "shape"])


def _write_all(images: list[TrainingImage], unparsed: list[str], folder: Path) -> dict[str, Any]:
    picture_folder = folder / "images" / "train"
    picture_folder.mkdir(parents=True)
    for image in images:
        shutil.copyfile(image.path, picture_folder / f"{image.identifier}.png")
    asked = [image for image in images if image.turns]
    captioned = [image for image in images if image.caption]
    conversations = [_llava_record(image, image.turns) for image in asked]
    captions = [_llava_record(image, [(CAPTION_REQUEST, image.caption or "")]) for image in captioned]
    metadata = [{"file_name": f"{image.identifier}.png", "labels": image.labels} for image in images]
    write_text_atomically(folder / "conversations.json", json.dumps(conversations, indent=1) + "\n")
    write_text_atomically(folder / "captions.json", json.dumps(captions, indent=1) + "\n")
    dialogues = [dialogue for image in captioned for dialogue in _dialogues(image)]
    write_text_atomically(folder / "dialogues.json", json.dumps(dialogues, indent=1) + "\n")
    write_text_atomically(picture_folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in metadata))
    summary = _summary(images, unparsed) | {"sha256": _fingerprints(folder)}
    write_text_atomically(folder / _SUMMARY, json.dumps(summary, indent=1) + "\n")
    return summary


def _llava_record(image: TrainingImage, turns: list[tuple[str, str]]) -> dict[str, Any]:
    messages = _messages("<image>", turns)
    return {"id": str(image.identifier), "image": f"train/{image.identifier}.png", "conversations": messages}


def _messages(shown: str, turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """The turns in LLaVA's form; `shown`, a picture or its caption, stands before the first question."""
    messages = []
    for index, (question, answer) in enumerate(turns):
        messages.append({"from": "human", "value": (f"{shown}\n" if index == 0 else "") + question})
        messages.append({"from": "gpt", "value": answer})
    return messages


def _dialogues(image: TrainingImage) -> Iterable[dict[str, Any]]:
    """Reading exercises for a language model: the caption stands where the image will stand later.

    Short ones, because in a long one the earlier answers already tell what the caption says.
    """
    assert image.caption is not None
    turns = [*image.turns, (CAPTION_REQUEST, image.caption)]
    random.Random(image.identifier).shuffle(turns)
    for start in range(0, len(turns), PAIRS_IN_A_DIALOGUE):
        chosen = turns[start : start + PAIRS_IN_A_DIALOGUE]
        yield {"id": f"{image.identifier}/{start}", "conversations": _messages(image.caption, chosen)}


def _summary(images: list[TrainingImage], unparsed: list[str]) -> dict[str, Any]:
    def count_known(kind: tuple[str, ...]) -> int:
        return sum(any(image.labels[attribute] == 1 for attribute in kind) for image in images)

    return {
        "complete": True,
        "format_version": FORMAT_VERSION,
        "source": "easy-vqa, train split",
        "images": len(images),
        "questions": sum(len(image.turns) for image in images),
        "distinct_questions": len({question for image in images for question, _ in image.turns}),
        "answers": dict(sorted(Counter(answer for image in images for _, answer in image.turns).items())),
        "captions": sum(image.caption is not None for image in images),
        "missing": {
            "images_without_questions": [image.identifier for image in images if not image.turns],
            "images_without_caption": [image.identifier for image in images if image.caption is None],
            "images_without_shape": len(images) - count_known(SHAPES),
            "images_without_color": len(images) - count_known(COLORS),
            "questions_without_label_rule": sorted(set(unparsed)),
        },
    }


def _fingerprints(folder: Path) -> dict[str, str]:
    """sha256 of each text file, and one over names and bytes of all pictures."""
    result = {name: file_sha256(folder / name) for name in _TEXT_FILES}
    pictures = hashlib.sha256()
    for path in sorted((folder / "images" / "train").glob("*.png")):
        content = path.read_bytes()
        pictures.update(f"{path.name}:{len(content)}\n".encode())
        pictures.update(content)
    return result | {"images/train/*.png": pictures.hexdigest()}


def _verify_existing(output: Path) -> dict[str, Any]:
    remedy = f"remove {output} or choose another --output"
    if not (output / _SUMMARY).is_file():
        raise ValueError(f"{output} exists but is no complete data set of this script (no {_SUMMARY}); {remedy}")
    try:
        summary = json.loads((output / _SUMMARY).read_text(encoding="utf-8"))
        complete = summary["complete"] is True and summary["format_version"] == FORMAT_VERSION
        recorded = summary["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{output / _SUMMARY} is not one that this script wrote; {remedy}") from error
    if not complete:
        raise ValueError(f"{output / _SUMMARY} is from another version of this script; {remedy}")
    missing = [name for name in _TEXT_FILES if not (output / name).is_file()]
    if missing:
        raise ValueError(f"{output} lacks {', '.join(missing)}; {remedy}")
    actual = _fingerprints(output)
    changed = [name for name, fingerprint in actual.items() if recorded.get(name) != fingerprint]
    if changed:
        raise ValueError(f"{output}: changed since it was written: {', '.join(changed)}; {remedy}")
    return summary


def main(arguments: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(
        prog="python -m training.prepare_easy_vqa", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--output", required=True, help="folder to write; an existing complete one is verified and kept"
    )
    options = parser.parse_args(arguments)
    summary = prepare(options.output)
    missing = summary["missing"]
    print("{}: {images} images, {questions} questions, {captions} captions".format(options.output, **summary))
    print(
        f"not derivable from the training questions: shape of {missing['images_without_shape']} images, colour of"
        f" {missing['images_without_color']}, caption of {len(missing['images_without_caption'])};"
        f" questions without a label rule: {len(missing['questions_without_label_rule'])}"
    )


if __name__ == "__main__":
    run_script(main)
