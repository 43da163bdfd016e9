"""COCO captions: one caption for each of the 5,000 images of Karpathy's test split, against five by people.

Official scorer: https://github.com/salaniz/pycocoevalcap, its CIDEr (see `eval.metrics.captions`); the split is that of
https://cs.stanford.edu/people/karpathy/deepimagesent. Words are weighed by how rare they are among the images that are
scored together, so the CIDEr of a part (`--limit`) is not comparable with that of the whole. No prompt is official:
this one is lmms-eval's. Reported, as in papers, times 100.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.answer_files import LLAVA, Format
from eval.benchmarks.official import field, importer, read_records
from eval.layouts import Layout
from eval.measures import Row, Style, mean_of
from eval.metrics.captions import cider_per_image
from eval.registry import Benchmark, Submission
from eval.samples import BenchmarkData, Prediction, Sample

_SPLIT = "dataset_coco.json"
_CAPTIONS = "annotations/captions_val2014.json"
_HIGHEST = 10.0
"""CIDEr of a caption that equals all its references."""


def load(root: Path) -> BenchmarkData:
    """Read the split and the captions; images in the order of the captions' file, as the official script takes them.

    Raises:
        ValueError: a malformed record, or an image of the split without captions; the message names it.
    """
    paths = _paths_of_test_images(root / _SPLIT)
    captions: dict[str, list[str]] = {name: [] for name in paths}
    for where, row in read_records(root / _CAPTIONS, "annotations"):
        name = str(field(row, ("image_id",), where))
        if name in captions:
            captions[name].append(str(field(row, ("caption",), where)))
    missing = next((name for name, texts in captions.items() if not texts), None)
    if missing is not None:
        raise ValueError(f"{root / _CAPTIONS}: no caption of image {missing}, which {_SPLIT} has in its test split")
    order = [str(row.get("id")) for _, row in read_records(root / _CAPTIONS, "images")]
    samples = (_sample(name, paths[name], captions[name]) for name in order if name in paths)
    return BenchmarkData(root, tuple(samples), compared=("id", "answers"))


def _paths_of_test_images(path: Path) -> dict[str, str]:
    """Image number -> place of the file."""
    paths = {}
    for where, row in read_records(path, "images"):
        if field(row, ("split",), where) == "test":
            folder, name = field(row, ("filepath",), where), field(row, ("filename",), where)
            paths[str(field(row, ("cocoid",), where))] = f"{folder}/{name}"
    return paths


def _sample(name: str, path: str, captions: Sequence[str]) -> Sample:
    return Sample(id=name, images=(path,), question="", target=captions[0], cluster=name, answers=tuple(captions))


def prompt(sample: Sample) -> str:
    """The same for every image."""
    return "Provide a one-sentence caption for the provided image."


def judge(text: str, sample: Sample) -> dict[str, Any]:
    """The caption as it is, and its first line; scores come from `score_together`."""
    lines = text.strip().split("\n")
    return {"parsed": text.strip() or None, "parsed_lenient": lines[0].strip() or None, "answers": list(sample.answers)}


def score_together(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each row `cider` (0 to 10) and `score` (the same, 0 to 1) of the caption, and of its first line."""
    references = {row["id"]: row["answers"] for row in rows}
    captions = {row["id"]: row["text"] for row in rows}
    first_lines = {row["id"]: row["parsed_lenient"] or "" for row in rows}
    official = cider_per_image(captions, references)
    lenient = official if first_lines == captions else cider_per_image(first_lines, references)
    return [
        {
            "cider": official[row["id"]],
            "cider_lenient": lenient[row["id"]],
            "score": official[row["id"]] / _HIGHEST,
            "score_lenient": lenient[row["id"]] / _HIGHEST,
        }
        for row in rows
    ]


def write_submission(data: BenchmarkData, predictions: Mapping[str, Prediction]) -> str:
    """The list of {"image_id", "caption"} that pycocoevalcap reads."""
    rows = [{"image_id": int(sample.id), "caption": predictions[sample.id].text} for sample in data.samples]
    return json.dumps(rows, ensure_ascii=False)


_TIMES_100 = Style(scale=100.0, digits=2, unit="")

BENCHMARK = Benchmark(
    name="coco_captions",
    split="karpathy_test",
    version="2014",
    reference="https://github.com/salaniz/pycocoevalcap",
    data_needed=f"--data-root DIR with DIR/coco_captions/{{{_SPLIT},{_CAPTIONS},val2014/COCO_val2014_*.jpg}}: the "
    "split is in caption_datasets.zip of cs.stanford.edu/people/karpathy/deepimagesent, the rest on cocodataset.org",
    n_expected=5000,
    fingerprint=None,
    prompt_id="one_sentence_caption",
    prompt=prompt,
    max_new_tokens=64,
    parser="official (PTBTokenizer of CoreNLP 3.4.1)",
    judge=judge,
    score_together=score_together,
    layouts=(Layout((_SPLIT, _CAPTIONS), load, ("val2014/COCO_val2014_*.jpg",)),),
    metrics=(
        mean_of("cider", "cider", primary=True, style=_TIMES_100, largest=10.0),
        mean_of("cider_lenient", "cider_lenient", style=_TIMES_100, largest=10.0),
    ),
    import_predictions=importer(Format("COCO results", "image_id", "caption"), LLAVA),
    submission=Submission("coco_captions_results.json", write_submission),
)
