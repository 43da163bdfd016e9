"""Stand-ins for LLaVA-1.5's two data files, of their shape and size but with made-up words, to try recipes on.

    python -m training.synthetic_llava --output data/llava15_synthetic

The folder it makes, laid out as LLaVA's playground/data:

    LLaVA-Pretrain/blip_laion_cc_sbu_558k.json   558,128 captions (stage 1)
    LLaVA-Pretrain/images/                       their pictures
    llava_v1_5_mix665k.json                      665,298 conversations, 40,688 of them without a picture (stage 2)
    coco/, gqa/, ocr_vqa/, textvqa/, vg/         their pictures
    encoder/, language/                          a tiny encoder and a tiny language model with random weights

The numbers of records by folder are the official ones; a few small pictures stand for all of a folder. `--share 0.001`
makes a thousandth of the records. Nothing was taken from the files themselves: words, pictures and weights are random.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from defocus_mllm.assemble import new_encoder
from defocus_mllm.console import run_script
from defocus_mllm.files import written_whole
from training.tokenizer import train_tokenizer

PRETRAIN_RECORDS = 558_128
"""https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain"""
MIX_RECORDS = {
    "coco/train2017": 364_100,
    "vg/VG_100K": 86_417,
    "ocr_vqa/images": 80_000,
    "gqa/images": 72_140,
    "textvqa/train_images": 21_953,
    "": 40_688,
}
"""Records of llava_v1_5_mix665k.json by the folder of their picture; "" has none."""
PRETRAIN_FILE = "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
MIX_FILE = "llava_v1_5_mix665k.json"
PRETRAIN_IMAGES = "LLaVA-Pretrain/images"

_PICTURES = 8
_PHRASES = 512
_CONTEXT = 2048
_SHORT_ANSWER = "\nAnswer the question using a single word or phrase."


class Phrases:
    """Made-up questions and answers; as many as can be told apart, since only lengths and number matter."""

    def __init__(self, generator: random.Random) -> None:
        self.generator = generator
        syllables = [first + second for first in "bdfgklmnprst" for second in "aeiou"]
        self.words = ["".join(generator.choices(syllables, k=generator.randint(1, 3))) for _ in range(400)]
        self.questions = [self._sentence(4, 14) + "?" for _ in range(_PHRASES)]
        self.answers = [self._sentence(1, 30) + "." for _ in range(_PHRASES)]
        self.long_texts = [" ".join(self._sentence(8, 20) + "." for _ in range(12)) for _ in range(_PHRASES)]

    def _sentence(self, least: int, most: int) -> str:
        return " ".join(self.generator.choices(self.words, k=self.generator.randint(least, most))).capitalize()

    def pick(self, phrases: list[str]) -> str:
        """One of them."""
        return phrases[int(self.generator.random() * len(phrases))]


def captions(records: int, phrases: Phrases) -> Iterator[dict[str, Any]]:
    """Records of stage 1: one question and one caption, the picture named before or behind the question."""
    for number in range(records):
        question = phrases.pick(phrases.questions)
        value = f"<image>\n{question}" if number % 2 else f"{question}\n<image>"
        name = f"{number % _PICTURES:05d}/{number % _PICTURES:09d}.jpg"
        yield _record(f"{number:09d}", name, [(value, phrases.pick(phrases.answers))])


def conversations(records: dict[str, int], phrases: Phrases) -> Iterator[dict[str, Any]]:
    """Records of stage 2, in random order; `records` says how many by folder, "" for those without a picture.

    Ids are strings or numbers, and not unique. Texts without a picture have the key "model", and are the long ones.
    """
    folders = [folder for folder, count in records.items() for _ in range(count)]
    phrases.generator.shuffle(folders)
    for number, folder in enumerate(folders):
        if not folder:
            pairs = [(phrases.pick(phrases.questions), phrases.pick(phrases.long_texts)) for _ in range(1 + number % 4)]
            yield {**_record(f"text{number % 1000}_0", None, pairs), "model": ""}
            continue
        suffix = _SHORT_ANSWER if number % 3 == 0 else ""
        count = 1 + int(phrases.generator.expovariate(0.25)) if "ocr" not in folder else 1
        pairs = [(phrases.pick(phrases.questions) + suffix, phrases.pick(phrases.answers)) for _ in range(count)]
        pairs[0] = (f"<image>\n{pairs[0][0]}", pairs[0][1])
        identifier = number if "vg" in folder else f"{number % 100_000:012d}"
        yield _record(identifier, f"{folder}/{number % _PICTURES:012d}.jpg", pairs)


def write(output: str | Path, share: float = 1.0, seed: int = 0) -> dict[str, int]:
    """Write the folder and return the number of records by file.

    Raises `FileExistsError` if there is something at `output`, `ValueError` for a share that is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"--share: must be above 0 and not above 1, got {share}")
    phrases = Phrases(random.Random(seed))
    mix = {folder: math.ceil(share * count) for folder, count in MIX_RECORDS.items()}
    counts = {PRETRAIN_FILE: math.ceil(share * PRETRAIN_RECORDS), MIX_FILE: sum(mix.values())}
    with written_whole(output) as folder:
        for name in (f"{PRETRAIN_IMAGES}/{number:05d}" for number in range(_PICTURES)):
            _write_pictures(folder / name, 9, phrases.generator)
        for name in filter(None, MIX_RECORDS):
            _write_pictures(folder / name, 12, phrases.generator)
        _write_records(folder / PRETRAIN_FILE, captions(counts[PRETRAIN_FILE], phrases), counts[PRETRAIN_FILE])
        _write_records(folder / MIX_FILE, conversations(mix, phrases), counts[MIX_FILE])
        _write_language_model(folder / "language", phrases)
        for part in new_encoder("defocus_vit_tiny", torch.float32):
            part.save_pretrained(folder / "encoder")
    return counts


def _record(identifier: str | int, image: str | None, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)]
    return {"id": identifier, **({"image": image} if image else {}), "conversations": turns}


def _write_records(path: Path, records: Iterator[dict[str, Any]], count: int) -> None:
    """One JSON list, as the official files are."""
    with path.open("w", encoding="utf-8") as stream:
        separator = "["
        for record in tqdm(records, path.name, count, delay=2):
            stream.write(separator + json.dumps(record))
            separator = ",\n"
        stream.write("]\n")


def _write_pictures(folder: Path, digits: int, generator: random.Random) -> None:
    folder.mkdir(parents=True)
    for number in range(_PICTURES):
        size = (generator.randint(40, 80), generator.randint(40, 80))
        colour = (generator.randrange(256), generator.randrange(256), generator.randrange(256))
        Image.new("RGB", size, colour).save(folder / f"{number:0{digits}d}.jpg")


def _write_language_model(folder: Path, phrases: Phrases) -> None:
    train_tokenizer(phrases.questions + phrases.answers, 1000, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), max_position_embeddings=_CONTEXT, **sizes, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def main(arguments: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(
        prog="python -m training.synthetic_llava", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--share", type=float, default=1.0, metavar="X", help="of the records (default: all)")
    options = parser.parse_args(arguments)
    for name, count in write(options.output, options.share).items():
        print(f"{options.output}/{name}: {count:,} records")


if __name__ == "__main__":
    run_script(main)
