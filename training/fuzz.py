"""Damaged records and pictures, each of which must be trained on correctly or reported: never a hang, never a crash.

    python -m training.fuzz --records 5000 --images 2000 --seed 0 --output docs/results/fuzz

Everything goes the way of a run with `on_bad_sample: skip`: the index, the images, the collator, a step of a tiny
model. What is trained on is compared with what the damaged record says, read here a second time and independently.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from defocus_mllm import (
    DefocusConfig,
    DefocusForConditionalGeneration,
    DefocusImageProcessor,
    DefocusProcessor,
    DefocusVisionConfig,
)
from defocus_mllm.console import run_script
from defocus_mllm.files import write_json_atomically, write_text_atomically
from defocus_mllm.provenance import commit, hardware, versions
from training.bad_samples import BAD_SAMPLES, BadSamples, decode
from training.conversations import Conversation, ConversationDataset, SourceOptions, open_conversations
from training.encoding import IGNORED
from training.fuzz_mutations import TEXTS, base_pictures, base_records, damaged, mutated_line
from training.supervision import ConversationCollator
from training.tokenizer import train_tokenizer

HANG_SECONDS = 300
"""A single record, picture or step that takes longer ends the program, with the place it hangs at."""
MEMORY_MEGABYTES = 2048
"""What may be added to the memory of the process; the largest picture that is not refused takes most of it."""

ResultT = TypeVar("ResultT")

_BATCH = 8
_IMAGE_SIZE = 32
_SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


class FuzzFailure(AssertionError):
    """Something was neither trained on correctly nor reported; the message says which, and how to make it again."""


@dataclass
class Outcome:
    """What became of one kind of damage."""

    mutated: int
    trained: int = 0
    reported: Counter[str] = field(default_factory=Counter)
    slowest_seconds: float = 0.0

    def timed(self, work: Callable[..., ResultT], *arguments: Any) -> ResultT:
        """`work(*arguments)`, which may not take `HANG_SECONDS`."""
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=sys.__stderr__ or sys.stderr)
        began = time.process_time()
        try:
            return work(*arguments)
        finally:
            faulthandler.cancel_dump_traceback_later()
            self.slowest_seconds = max(self.slowest_seconds, time.process_time() - began)

    def as_dict(self) -> dict[str, Any]:
        """For the results."""
        return {
            "mutated": self.mutated,
            "trained_on_correctly": self.trained,
            "reported": self.reported.total(),
            "reported_by_cause": dict(self.reported.most_common()),
            "slowest_cpu_seconds": round(self.slowest_seconds, 3),
        }


class Trainee:
    """A tiny model that takes the loss of every batch it is shown, and checks what it is shown."""

    def __init__(self, folder: Path) -> None:
        train_tokenizer(list(TEXTS[:4]) * 20, 320, folder / "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        vision = DefocusVisionConfig(image_size=_IMAGE_SIZE, patch_size=16, **_SIZES)  # type: ignore[arg-type]
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        text = {"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": 65_536, **_SIZES, **ids}
        config = DefocusConfig(vision_config=vision, text_config=text, image_token_id=tokenizer.image_token_id)
        self.model = DefocusForConditionalGeneration(config)
        image_processor = DefocusImageProcessor(size={"height": _IMAGE_SIZE, "width": _IMAGE_SIZE})
        self.processor = DefocusProcessor(image_processor, tokenizer, num_image_tokens=vision.num_image_tokens)
        self.collate = ConversationCollator(self.processor, skip_bad=True)

    def learn(
        self, samples: Sequence[Conversation], expected: Sequence[tuple[list[str], int]], outcome: Outcome
    ) -> None:
        """A forward and backward pass; `expected` are the answers and the number of images of each sample.

        Raises `FuzzFailure` if a sample is neither reported nor supervised as expected, or the loss is not finite.
        """
        batch = outcome.timed(self.collate, samples)
        bad = {sample.record: sample.cause for sample in decode(batch.pop(BAD_SAMPLES))} if BAD_SAMPLES in batch else {}
        outcome.reported.update(bad.values())
        images = 0
        for row, (sample, (answers, num_images)) in enumerate(zip(samples, expected, strict=True)):
            labels, ids = batch["labels"][row], batch["input_ids"][row]
            wanted = [] if sample.record in bad else self._supervised_ids(answers)
            if labels[labels != IGNORED].tolist() != wanted:
                raise FuzzFailure(f"{sample.record}: not its answers are supervised")
            if sample.record not in bad:
                outcome.trained += 1
                images += num_images
                placeholders = int((ids == self.processor.image_token_id).sum())
                if placeholders != num_images * self.processor.num_image_tokens:
                    raise FuzzFailure(f"{sample.record}: {placeholders} image tokens for {num_images} images")
        pixels = batch.get("pixel_values", torch.empty(0, 3, _IMAGE_SIZE, _IMAGE_SIZE))
        if pixels.shape != (images, 3, _IMAGE_SIZE, _IMAGE_SIZE) or not pixels.isfinite().all():
            raise FuzzFailure(f"{samples[0].record} ff.: pixel values {tuple(pixels.shape)} for {images} images")
        if (batch["labels"] != IGNORED).any():
            loss = outcome.timed(lambda: self.model(**batch, use_cache=False).loss)
            outcome.timed(loss.backward)
            if not loss.isfinite():
                raise FuzzFailure(f"{samples[0].record} ff.: loss {loss.item()}")

    def _supervised_ids(self, answers: Sequence[str]) -> list[int]:
        """Ids of the answers with the end of turn behind each."""
        tokenizer, ids = self.processor.tokenizer, []
        for answer in answers:
            ids += tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            ids.append(tokenizer.eos_token_id)
        return ids


def fuzz_records(number: int, seed: int, folder: Path, trainee: Trainee) -> Outcome:
    """Damage `number` records, load them as one JSON Lines file, and train on those that are left."""
    draw = random.Random(seed)
    shapes = base_records()
    root = _image_root(folder / "records")
    first = json.dumps(shapes[2]).encode()  # its bracket tells that these are lines
    lines = [first, *(mutated_line(draw.choice(shapes), draw) for _ in range(number))]
    path = folder / "records.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    outcome = Outcome(number)
    bad = BadSamples("skip")
    dataset = outcome.timed(open_conversations, [_source(path, root)], bad)
    outcome.slowest_seconds = 0.0  # that was all of them
    outcome.reported.update(bad.by_cause())
    if len(dataset) + len(bad) != len(lines):
        raise FuzzFailure(f"of {len(lines)} records {len(dataset)} are used and {len(bad)} reported (seed {seed})")
    _learn_all(dataset, lambda name: _expected(lines[int(re.findall(r"\[(\d+)\]", name)[0])]), trainee, outcome)
    outcome.trained -= 1  # the first
    for line in tqdm(lines[:: max(10, len(lines) // 200)], "as lists", delay=2):
        outcome.timed(_load_as_list, line, folder, root)
    return outcome


def _load_as_list(line: bytes, folder: Path, root: Path) -> None:
    """The line as the only record of a JSON list: usable, or an error of one line that names the file."""
    path = folder / "list.json"
    path.write_bytes(b"[" + line + b"]")
    try:
        open_conversations([_source(path, root)], BadSamples("raise"))
    except (ValueError, FileNotFoundError) as error:
        if str(path) not in str(error) or "\n" in str(error):
            raise FuzzFailure(f"{line[:200]!r} ends with the message {error}") from error


def fuzz_images(number: int, seed: int, folder: Path, trainee: Trainee) -> Outcome:
    """Damage `number` pictures and train on a conversation about each."""
    draw = random.Random(seed + 1)
    kinds = base_pictures()
    root = folder / "pictures"
    root.mkdir()
    records = []
    for index in range(number):
        name = draw.choice(list(kinds))
        (root / f"{index}_{name}").write_bytes(damaged(kinds[name], draw))
        turns = [{"from": "human", "value": f"<image>\n{TEXTS[0]}"}, {"from": "gpt", "value": "red"}]
        records.append({"image": f"{index}_{name}", "conversations": turns})
    path = folder / "pictures.json"
    path.write_text(json.dumps(records))
    dataset = open_conversations([_source(path, root)], BadSamples("raise"))
    outcome = Outcome(number)
    _learn_all(dataset, lambda name: (["red"], 1), trainee, outcome)
    return outcome


def _learn_all(
    dataset: ConversationDataset, expected: Callable[[str], tuple[list[str], int]], trainee: Trainee, outcome: Outcome
) -> None:
    for start in tqdm(range(0, len(dataset), _BATCH), "training", delay=2):
        samples = [dataset[index] for index in range(start, min(start + _BATCH, len(dataset)))]
        trainee.learn(samples, [expected(sample.record) for sample in samples], outcome)


def _expected(line: bytes) -> tuple[list[str], int]:
    """(answers, number of images) of a record that is used, read without any of the code that is tested."""
    record = json.loads(line)
    answers, num_images = [], 0
    for turn in record.get("conversations") or record.get("messages"):
        role, content = turn.get("from") or turn.get("role"), turn.get("value")
        content = turn.get("content") if content is None else content
        if isinstance(content, str):
            num_images += content.count("<image>")
            texts = [content]
        else:
            num_images += sum(part["type"] != "text" for part in content)
            texts = [part["text"] for part in content if part["type"] == "text" and part["text"]]
        if role in ("gpt", "assistant"):
            answers.append("\n".join(texts))
    return answers, num_images


def _source(path: Path, root: Path) -> SourceOptions:
    return SourceOptions(str(path), str(root), cache=str(path.parent / "cache"))


def _image_root(root: Path) -> Path:
    """A folder with the two pictures that records name, and a link that leads out of it."""
    root.mkdir()
    pictures = base_pictures()
    (root / "a.png").write_bytes(pictures["alpha.png"])
    (root / "b.jpg").write_bytes(pictures["rgb.jpg"])
    (root.parent / "secret.png").write_bytes(pictures["rgb.png"])
    (root / "link.png").symlink_to(root.parent / "secret.png")
    return root


def run(records: int, images: int, seed: int) -> dict[str, Any]:
    """Both, and what they cost. Raises `FuzzFailure`, or whatever else damage should not have raised."""
    began = time.perf_counter()
    torch.manual_seed(seed)
    folder = Path(tempfile.mkdtemp(prefix="defocus-fuzz-"))
    try:
        trainee = Trainee(folder)
        before = _peak_megabytes()
        outcomes = {
            "records": fuzz_records(records, seed, folder, trainee),
            "images": fuzz_images(images, seed, folder, trainee),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    added = _peak_megabytes() - before
    if added > MEMORY_MEGABYTES:
        raise FuzzFailure(f"the memory grew by {added:,.0f} MiB, more than {MEMORY_MEGABYTES:,} (seed {seed})")
    for name, outcome in outcomes.items():
        if outcome.trained + outcome.reported.total() != outcome.mutated:
            raise FuzzFailure(f"{name}: {outcome.as_dict()} does not add up (seed {seed})")
    return {
        **{name: outcome.as_dict() for name, outcome in outcomes.items()},
        "memory_added_mebibytes": round(added),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# Damaged data",
        "",
        f"`{' '.join(result['command'])}` at commit {result['commit']}, on {result['hardware']['processor']}, "
        f"{result['hardware']['cores']} cores, in {result['seconds']:,} s. Written by that command.",
        "",
        "Every damaged record and picture went the way of a run with `on_bad_sample: skip`. What was trained on had "
        "exactly its own answers supervised and a finite loss; everything else was reported with its cause. Nothing "
        f"took longer than {HANG_SECONDS} s; the memory of the process grew by "
        f"{result['memory_added_mebibytes']:,} MiB.",
        "",
        "| | damaged | trained on correctly | reported | neither | slowest, CPU time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in ("records", "images"):
        found = result[name]
        lines.append(
            f"| {name} | {found['mutated']:,} | {found['trained_on_correctly']:,} | {found['reported']:,} | 0 "
            f"| {found['slowest_cpu_seconds']} s |"
        )
    for name in ("records", "images"):
        lines += ["", f"| {name} reported because | |", "| --- | --- |"]
        lines += [f"| {cause} | {count:,} |" for cause, count in result[name]["reported_by_cause"].items()]
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m training.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=5000, help="damaged records")
    parser.add_argument("--images", type=int, default=2000, help="damaged pictures")
    parser.add_argument("--seed", type=int, default=0, help="decides the damage")
    parser.add_argument("--output", default="", help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args(argv)
    code = commit(Path(__file__).parent)  # now: the checkout may change until it ends
    result = run(arguments.records, arguments.images, arguments.seed)
    words = sys.argv[1:] if argv is None else list(argv)
    result |= {
        "seed": arguments.seed,
        "command": ["python", "-m", "training.fuzz", *words],
        "commit": code,
        "hardware": hardware(),
        "versions": versions(),
    }
    if arguments.output:
        write_json_atomically(f"{arguments.output}.json", result)
        write_text_atomically(f"{arguments.output}.md", page(result))
    print(page(result))


if __name__ == "__main__":
    run_script(main)
