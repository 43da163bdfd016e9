"""Rows as the datasets of the Hub have them, and the same questions in the official files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from eval.benchmarks.mmmu import SUBJECTS

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def picture(shade: int) -> dict[str, Any]:
    """The cell of an image."""
    buffer = io.BytesIO()
    Image.new("RGB", (12, 9), (shade, 30, 60)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def table(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """The rows, with columns that hold images declared as images or lists of them."""
    kinds: dict[str, Any] = {}
    for row in rows:
        for name, cell in row.items():
            if isinstance(cell, dict) and set(cell) == {"bytes", "path"}:
                kinds[name] = datasets.Image()
            elif isinstance(cell, list) and cell and isinstance(cell[0], dict) and "bytes" in cell[0]:
                kinds[name] = datasets.List(datasets.Image())
    bare = datasets.Dataset.from_list([{name: row[name] for name in row if name not in kinds} for row in rows])
    return datasets.Dataset.from_list(rows, features=datasets.Features(dict(bare.features) | kinds))


TEN = [{"answer": "yes", "answer_confidence": "yes", "answer_id": number} for number in range(1, 11)]
MCQ = {"choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4", "answer": "B", "question_type_id": 1}

ROWS: dict[str, dict[tuple[str | None, str], list[dict[str, Any]]]] = {
    "pope": {
        (None, "test"): [
            {
                "id": str(at),
                "question_id": "1",
                "question": f"Is there a dog, {category}?",
                "answer": "yes",
                "image_source": "COCO_val2014_000000000007",
                "category": category,
                "image": picture(7),
            }
            for at, category in enumerate(("random", "popular", "adversarial"))
        ]
    },
    "mme": {
        (None, "test"): [
            {
                "question_id": "artwork/1.jpg",
                "category": "artwork",
                "question": f"Is it {name}? Please answer yes or no.",
                "answer": answer,
                "image": picture(9),
            }
            for name, answer in (("A", "Yes"), ("B", "No"))
        ]
    },
    "mmbench": {
        ("en", "dev"): [
            {
                "index": index,
                "question": "Q?",
                "hint": "nan",
                "A": "cat",
                "B": "dog",
                "C": "nan",
                "D": "nan",
                "answer": "A",
                "category": "x",
                "image": picture(3),
            }
            for index in (7, 1000007)
        ]
    },
    "seed_bench": {
        (None, "test"): [
            MCQ | {"question_id": "5", "question": "Q?", "data_id": "a_1", "data_type": "image", "image": [picture(5)]},
            MCQ
            | {"question_id": "9", "question": "Q?", "data_id": "v", "data_type": "video", "image": [picture(1)] * 3},
            MCQ | {"question_id": "5", "question": "Q?", "data_id": "a_1", "data_type": "image", "image": [picture(5)]},
        ]
    },
    "scienceqa": {
        ("ScienceQA-FULL", "test"): [
            {"image": None, "question": "Q?", "choices": ["a", "b"], "answer": 1, "hint": ""},
            {"image": picture(4), "question": "R?", "choices": ["a", "b", "c"], "answer": 0, "hint": "Look."},
        ]
    },
    "vqav2": {
        (None, "validation"): [
            {
                "question_id": 42001,
                "image_id": 42,
                "question": "Is it?",
                "answer_type": "yes/no",
                "multiple_choice_answer": "yes",
                "answers": TEN,
                "image": picture(42),
            }
        ]
    },
    "okvqa": {
        (None, "val2014"): [
            {"question_id": "425", "question": "Is it?", "answers": ["yes"] * 10, "image": picture(42)},
        ]
    },
    "textvqa": {
        (None, "validation"): [
            {
                "question_id": 8,
                "image_id": "ab12",
                "question": "What does it say?",
                "answers": ["stop"] * 10,
                "ocr_tokens": ["STOP", "now"],
                "image": picture(8),
            }
        ]
    },
    "vizwiz": {
        (None, "val"): [
            {
                "question_id": "VizWiz_val_00000000.jpg",
                "question": "Can you tell?",
                "answers": ["no"] * 10,
                "category": "other",
                "image": picture(2),
            }
        ]
    },
    "gqa": {
        ("testdev_balanced_instructions", "testdev"): [
            {"id": "201", "imageId": "n5", "question": "Is it?", "answer": "no", "types": {"structural": "verify"}},
        ],
        ("testdev_balanced_images", "testdev"): [
            {"id": "n4", "image": picture(40)},
            {"id": "n5", "image": picture(50)},
        ],
    },
}
ROWS["textvqa_ocr"] = ROWS["textvqa"]
_TEST_QUESTIONS = [
    {"question_id": number, "image_id": 7, "question": "Is it?", "answers": None, "image": picture(7)}
    for number in (7001, 7002)
]
ROWS["vqav2_test_dev"] = {(None, "testdev"): _TEST_QUESTIONS[1:], (None, "test"): _TEST_QUESTIONS}
ROWS["vizwiz_test"] = {
    (None, "test"): [
        {"question_id": "VizWiz_test_00000003.jpg", "question": "And this?", "answers": None, "image": picture(6)}
    ]
}

_CHART = {"question": "How many?", "answer": "5", "image": picture(1)}
ROWS["chartqa"] = {
    (None, "test"): [_CHART | {"type": "human_test"}] * 1250
    + [_CHART | {"type": "augmented_test", "answer": "6", "image": picture(2)}]
}
for _split, _answers in (("validation", ["5", "five"]), ("test", None)):
    _name = "vqa" if _split == "validation" else "vqa_test"
    _asked = {"question": "How many?", "answers": _answers, "image": picture(3)}
    ROWS[f"doc{_name}"] = {
        ("DocVQA", _split): [
            _asked
            | {
                "questionId": "49153",
                "question_types": ["figure"],
                "ucsf_document_id": "pybv0228",
                "ucsf_document_page_no": "81",
            }
        ]
    }
    ROWS[f"info{_name}"] = {
        ("InfographicVQA", _split): [
            _asked
            | {
                "questionId": "98313",
                "answer_type": ["single span"],
                "image_url": "https://example.org/a.jpg",
                "operation/reasoning": ["counting"],
            }
        ]
    }
for _name, _shade in (("ai2d", 4), ("ai2d_no_mask", 5)):
    ROWS[_name] = {
        (None, "test"): [
            {"question": "Which?", "options": ["a", "b", "c", "d"], "answer": "2", "image": picture(_shade)},
        ]
    }
_MMMU = {"question": "Is it <image 1>?", "options": "['x', 'y']", "answer": "B", "question_type": "multiple-choice"}
ROWS["mmmu"] = {
    (subject, "validation"): [
        _MMMU | {"id": f"validation_{subject}_1", "image_1": picture(at), "image_2": None, "image_3": picture(at + 100)}
    ]
    for at, subject in enumerate(SUBJECTS)
}

_LLAVA = {"question_id": 0, "question": "Name it.", "image_id": "001", "category": "conv", "image": picture(6)}
ROWS["llava_bench"] = {(None, "train"): [_LLAVA]}
_VET = {"question_id": "v1_0", "question": "x?", "answer": "-1 <AND> -5", "capability": "ocr,math", "image": picture(7)}
ROWS["mm_vet"] = {(None, "test"): [_VET]}

_VQA = {"question_id": 42001, "image_id": 42, "question": "Is it?"}
_OKVQA = _VQA | {"question_id": 425}
_TEXT = {"question_id": 8, "image_id": "ab12", "question": "What does it say?", "answers": ["stop"] * 10}
_DOCUMENT = {"questionId": 49153, "question": "How many?", "answers": ["5", "five"], "question_types": ["figure"]}
_DOCUMENT |= {"image": "documents/pybv0228_81.png", "ucsf_document_id": "pybv0228", "ucsf_document_page_no": "81"}
_TEXT_FILE = {"TextVQA_0.5.1_val.json": {"data": [_TEXT]}}

OFFICIAL: dict[str, dict[str, Any]] = {
    "pope": {
        f"coco_pope_{category}.json": {
            "question_id": 1,
            "image": "COCO_val2014_000000000007.jpg",
            "text": f"Is there a dog, {category}?",
            "label": "yes",
        }
        for category in ("random", "popular", "adversarial")
    },
    "mme": {
        "ground_truth.jsonl": "".join(
            f'{{"category": "artwork", "image_stem": "1", "question": "Is it {name}?", "answer": "{answer}"}}\n'
            for name, answer in (("A", "yes"), ("B", "no"))
        )
    },
    "mmbench": {
        "mmbench_dev_20230712.tsv": "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\n"
        + "".join(f"{index}\tQ?\t\tcat\tdog\t\t\tA\tx\n" for index in (7, 1000007))
    },
    "seed_bench": {
        "SEED-Bench.json": {
            "questions": [MCQ | {"question_id": "5", "question": "Q?", "data_id": "a_1", "data_type": "image"}]
        }
    },
    "vqav2": {
        "v2_OpenEnded_mscoco_val2014_questions.json": {"questions": [_VQA]},
        "v2_mscoco_val2014_annotations.json": {
            "annotations": [
                _VQA | {"answer_type": "yes/no", "multiple_choice_answer": "yes", "answers": TEN},
            ]
        },
    },
    "okvqa": {
        "OpenEnded_mscoco_val2014_questions.json": {"questions": [_OKVQA]},
        "mscoco_val2014_annotations.json": {"annotations": [_OKVQA | {"answers": TEN}]},
    },
    "vqav2_test_dev": {
        f"v2_OpenEnded_mscoco_{split}2015_questions.json": {
            "questions": [{"question_id": number, "image_id": 7, "question": "Is it?"} for number in numbers]
        }
        for split, numbers in (("test-dev", [7002]), ("test", [7001, 7002]))
    },
    "llava_bench": {
        "questions.jsonl": {"question_id": 0, "image": "001.jpg", "category": "conv", "text": "Name it."},
    },
    "mm_vet": {
        "mm-vet.json": {
            "v1_0": {"imagename": "v1_0.png", "question": "x?", "answer": "-1 <AND> -5", "capability": ["ocr", "math"]}
        }
    },
    "docvqa": {"spdocvqa_qas/val_v1.0_withQT.json": {"data": [_DOCUMENT]}},
    "docvqa_test": {
        "spdocvqa_qas/test_v1.0.json": {"data": [{**_DOCUMENT, "answers": None, "question_types": None}]},
    },
    "textvqa": _TEXT_FILE,
    "textvqa_ocr": _TEXT_FILE
    | {
        "TextVQA_Rosetta_OCR_v0.2_val.json": {"data": [{"image_id": "ab12", "ocr_tokens": ["STOP", "now"]}]},
    },
    "vizwiz": {
        "Annotations/val.json": [
            {
                "image": "VizWiz_val_00000000.jpg",
                "question": "Can you tell?",
                "answers": [{"answer": "no"}] * 10,
                "answer_type": "other",
            }
        ]
    },
    "vizwiz_test": {"Annotations/test.json": [{"image": "VizWiz_test_00000003.jpg", "question": "And this?"}]},
    "gqa": {
        "testdev_balanced_questions.json": {
            "201": {"imageId": "n5", "question": "Is it?", "answer": "no", "types": {"structural": "verify"}}
        }
    },
}


def write_snapshot(folder: Path, name: str, readme: bool = False) -> None:
    """The files of a repository: Parquet under the usual names, or under others that only the README tells."""
    entries = []
    for (config, split), rows in ROWS[name].items():
        place = "odd" if readme else config or "data"
        data = table(rows)
        for shard in range(2 if len(rows) > 1 else 1):
            path = folder / place / f"{split}-{shard:05d}-of-{2 if len(rows) > 1 else 1:05d}.parquet"
            path = path.with_name(f"{config}-{path.name}") if readme else path
            path.parent.mkdir(parents=True, exist_ok=True)
            data.shard(2, shard, contiguous=True).to_parquet(path) if len(rows) > 1 else data.to_parquet(path)
        files = f"{{split: {split}, path: odd/{config}-{split}-*}}"
        entries.append(f"- config_name: {config or 'default'}\n  data_files: [{files}]\n")
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(entries)}---\n# Data\n" if readme else "# Data\n")
