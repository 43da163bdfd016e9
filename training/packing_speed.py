"""Samples a second with packed rows against padded ones, on lengths distributed like LLaVA-1.5's instruction data.

    python -m training.packing_speed --output docs/results --name packing

Both train the same tiny MLLM (encoder frozen, projector and decoder learn, as in LLaVA-1.5's stage 2) on the same
samples in the same steps, in one process and in turn; that the losses are equal is checked at every step. Writes
NAME.json and NAME.md in OUTPUT.
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from defocus_mllm import DefocusConfig, DefocusForConditionalGeneration, DefocusVisionConfig
from defocus_mllm.console import run_script
from defocus_mllm.files import refuse_existing, write_json_atomically, write_text_atomically
from defocus_mllm.provenance import commit, hardware, versions
from training.batches import Batch
from training.encoding import IGNORED, Example
from training.grouping import grouped_order
from training.multimodal import answer_loss
from training.packing import PackedSampler
from training.padding import packed_rows, padded_rows, padding_share
from training.sampling import BatchPlan, MicroBatchSampler, mix_seed
from training.stage import count_supervised
from training.supervision import pack_examples, pad_examples

LIMIT = 1.5
"""Times as many samples a second that packing must reach."""
TOLERANCE = 1e-4
"""Largest relative difference of the losses, after updates that add up what float32 rounds."""
WARM_UP = 1
PAD, IMAGE_TOKEN, VOCABULARY = 0, 1, 500
SMALLER = 4
"""All lengths, that of a row too, are divided by this, so that a CPU takes seconds; shares of padding stay the same."""
MAX_LENGTH = 2048 // SMALLER
GRID = 12
"""Patches along each side of an image: 144, a quarter of LLaVA-1.5's 576; our encoder adds a class token."""


@dataclass(frozen=True)
class Source:
    """A part of the data: how many samples, with an image or not, and the length of their words."""

    name: str
    samples: int
    median: float
    """Tokens of the words of half of the samples at most, system prompt included."""
    spread: float
    """Standard deviation of the logarithm of that length."""
    image: bool = True


MIX665K = (
    Source("LLaVA", 157_712, 260, 0.5),
    Source("ShareGPT", 40_688, 1300, 0.9, image=False),
    Source("VQAv2", 82_783, 150, 0.35),
    Source("GQA", 72_140, 230, 0.4),
    Source("OKVQA", 8_998, 70, 0.2),
    Source("OCR-VQA", 80_000, 150, 0.35),
    Source("A-OKVQA", 66_160, 110, 0.25),
    Source("TextCaps", 21_953, 150, 0.5),
    Source("RefCOCO", 48_447, 350, 0.5),
    Source("VG", 86_417, 350, 0.5),
)
"""The 665,298 samples of LLaVA-1.5's stage 2 by source, 40,688 of them without an image. The numbers of samples are
published, the lengths of the words are not: medians and spreads are our estimates, from the kind of questions and how
many each source asks about an image."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; returns 1 if packing is slower than `LIMIT` asks, else 0.

    Raises:
        ValueError: the losses differ.
        FileExistsError: there are results of that name.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = argument_parser().parse_args(words)
    record, page = (arguments.output / f"{arguments.name}.{kind}" for kind in ("json", "md"))
    for path in (record, page):
        refuse_existing(path)
    command = shlex.join(["python", "-m", "training.packing_speed", *words])
    results = measure(arguments.steps, arguments.batch, arguments.rows, arguments.seed)
    results = {"command": command, "seed": arguments.seed, **origin(), **results}
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json_atomically(record, results)
    write_text_atomically(page, markdown(results, record.name))
    print(f"{results['ratio']:.2f} times as many samples a second as padded; written to {arguments.output}")
    return int(results["ratio"] < LIMIT)


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.packing_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--name", default="packing", help="of the files, without their endings")
    parser.add_argument("--steps", type=int, default=7, metavar="N", help="optimizer steps that count")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="samples of a step")
    parser.add_argument("--rows", type=int, default=16, metavar="N", help="rows at once (LLaVA-1.5: 16 a GPU)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of lengths, weights, words and order")
    return parser


# --- the data ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """What a sample is made of: image tokens, then words."""

    image: bool
    words: int

    @property
    def tokens(self) -> int:
        """Its length."""
        return self.words + self.image * image_tokens()


def image_tokens() -> int:
    """Tokens of an image."""
    return GRID**2 + 1


def draw_samples(count: int, seed: int) -> list[Sample]:
    """Samples of the mixture, each cut to `MAX_LENGTH` as conversations are."""
    chance = random.Random(mix_seed(seed, 1))
    sources = chance.choices(MIX665K, [source.samples for source in MIX665K], k=count)
    samples = []
    for source in sources:
        words = round(source.median * chance.lognormvariate(0, source.spread) / SMALLER)
        samples.append(Sample(source.image, max(4, min(words, MAX_LENGTH - source.image * image_tokens()))))
    return samples


def make_example(sample: Sample, number: int) -> Example:
    """Random words, the last third of which is learnt, behind a random picture."""
    generator = torch.Generator().manual_seed(number)
    text = torch.randint(IMAGE_TOKEN + 1, VOCABULARY, (sample.words,), generator=generator)
    ids = torch.cat([torch.full((sample.image * image_tokens(),), IMAGE_TOKEN), text])
    labels = ids.clone()
    labels[: len(ids) - max(1, sample.words // 3)] = IGNORED
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if sample.image:
        example["pixel_values"] = torch.randn(1, 3, 2 * GRID, 2 * GRID, generator=generator)
    return example


def make_model(seed: int) -> DefocusForConditionalGeneration:
    """A decoder, and before it an encoder that is frozen and small beside it, as in LLaVA-1.5."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 32}
    vision = DefocusVisionConfig(image_size=2 * GRID, patch_size=2, intermediate_size=128, **sizes)
    text: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 128}
    text |= {"intermediate_size": 344, "vocab_size": VOCABULARY, "pad_token_id": PAD}
    config = DefocusConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    model = DefocusForConditionalGeneration(config).train()
    model.model.vision_tower.requires_grad_(False)
    return model


# --- the measurement --------------------------------------------------------------------------------------------------


class Contestant:
    """A model that takes one step of training a call.

    Args:
        micro_batches: step -> its micro-batches, made anew, which is part of what is measured.
    """

    def __init__(self, micro_batches: Callable[[int], Iterator[Batch]], items: Callable[[int], int], seed: int) -> None:
        self.model = make_model(seed)
        self.compute_loss = answer_loss(self.model)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
        self.micro_batches, self.items = micro_batches, items

    def step(self, number: int) -> tuple[float, float]:
        """Take step `number`; returns its loss and its seconds."""
        items = self.items(number)
        began = time.perf_counter()
        loss = torch.zeros(())
        for batch in self.micro_batches(number):
            part = self.compute_loss(self.model, batch, items)
            part.backward()
            loss += part.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item(), time.perf_counter() - began


def measure(steps: int, batch: int, rows: int, seed: int) -> dict[str, Any]:
    """Train both for `steps` steps, one step of each in turn, in random order.

    Args:
        batch: samples of a step.
        rows: rows taken at once, of one sample each or packed.

    Raises `ValueError` if the losses of a step differ by more than `TOLERANCE`.
    """
    total = WARM_UP + steps
    samples = draw_samples(batch * total, seed)
    lengths = [sample.tokens for sample in samples]
    plan = BatchPlan(len(samples), batch, rows, 1, seed)
    examples = [make_example(sample, number) for number, sample in enumerate(samples)]
    packer = PackedSampler(lambda key: lengths[key.sample], MAX_LENGTH, plan, 0, total, 0)

    def items(step: int) -> int:
        return sum(count_supervised(pad_examples([examples[key.sample]], PAD)) for key in plan.keys_of_step(step))

    def padded(step: int) -> Iterator[Batch]:
        for keys in MicroBatchSampler(plan, step, step + 1, 0):
            taken = [examples[key.sample] for key in keys]
            yield with_pictures(pad_examples(taken, PAD), taken)

    def packed(step: int) -> Iterator[Batch]:
        for parts in packer.rows_of_step(step):
            taken = [[examples[key.sample] for key in row] for row in parts[0]]
            yield with_pictures(pack_examples(taken, PAD), [example for row in taken for example in row])

    contestants = {"padded": Contestant(padded, items, seed), "packed": Contestant(packed, items, seed)}
    outcome = take_turns(contestants, total, seed)
    speeds = {name: [batch / seconds for seconds in taken] for name, taken in outcome["seconds"].items()}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    grouped = replace(plan, order=grouped_order(lengths, seed, batch, [sample.image for sample in samples]))
    of_rows = list(packed_rows(packer, total, lengths))
    return {
        "ratio": medians["packed"] / medians["padded"],
        "limit": LIMIT,
        "samples_per_second": {"median": medians, "of_each_step": speeds},
        **outcome,
        "padding": {
            "padded": padding_share(padded_rows(plan, total, lengths)),
            "packed": padding_share(of_rows),
            "grouped by modality and length": padding_share(padded_rows(grouped, total, lengths)),
        },
        "rows_per_step": sum(map(len, of_rows)) / total,
        "data": describe_lengths(samples),
        "shapes": {"samples_per_step": batch, "rows_at_once": rows, "max_length": MAX_LENGTH},
    }


def take_turns(contestants: dict[str, Contestant], total: int, seed: int) -> dict[str, Any]:
    """Seconds and losses of each step after `WARM_UP`, by contestant."""
    chance = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    losses: dict[str, list[float]] = {name: [] for name in contestants}
    for number in tqdm(range(total), "steps of both", mininterval=0.5):
        for name in chance.sample(list(contestants), len(contestants)):
            loss, taken = contestants[name].step(number)
            losses[name].append(loss)
            if number >= WARM_UP:
                seconds[name].append(taken)
        one, other = (of_name[-1] for of_name in losses.values())
        if abs(one - other) > TOLERANCE * abs(other):
            raise ValueError(f"step {number}: the losses of {', '.join(losses)} differ: {one} and {other}")
    differences = [abs(one - other) / other for one, other in zip(*losses.values(), strict=True)]
    return {"seconds": seconds, "losses": losses, "largest_difference_of_losses": max(differences)}


def with_pictures(batch: Batch, examples: Sequence[Example]) -> Batch:
    """The batch with all pictures of its examples, if there are any."""
    pictures = [example["pixel_values"] for example in examples if "pixel_values" in example]
    return {**batch, "pixel_values": torch.cat(pictures)} if pictures else batch


# --- what is written --------------------------------------------------------------------------------------------------


def describe_lengths(samples: Sequence[Sample]) -> dict[str, Any]:
    """What was drawn."""
    lengths = [sample.tokens for sample in samples]
    deciles = statistics.quantiles(lengths, n=10, method="inclusive")
    return {
        "samples": len(samples),
        "without_image": sum(not sample.image for sample in samples),
        "image_tokens": image_tokens(),
        "mean_tokens": statistics.mean(lengths),
        "deciles_of_tokens": deciles,
        "at_max_length": sum(length == MAX_LENGTH for length in lengths),
        "lengths_divided_by": SMALLER,
    }


def origin() -> dict[str, Any]:
    """Commit, machine and versions."""
    revision = commit(Path(__file__).parent)
    return {
        "commit": revision and revision.partition("+")[0],
        "dirty": revision and revision.endswith("+changes"),
        "hardware": hardware(),
        "versions": versions(),
    }


def markdown(results: dict[str, Any], record: str) -> str:
    """The page; `record` names the JSON beside it."""
    data, shapes, machine = results["data"], results["shapes"], results["hardware"]
    lines = ["# Packed rows against padding", ""]
    lines += [
        f"**{results['ratio']:.2f} times as many samples a second** at equal loss (limit: {results['limit']} times, "
        f"{'held' if results['ratio'] >= results['limit'] else '**missed**'}).",
        "",
        "| | Samples/s, median (min to max) | Padding |",
        "| --- | --- | --- |",
    ]
    for name, speeds in results["samples_per_second"]["of_each_step"].items():
        median = results["samples_per_second"]["median"][name]
        lines.append(
            f"| {name} | {median:.1f} ({min(speeds):.1f} to {max(speeds):.1f}) | {results['padding'][name]:.1%} |"
        )
    others = {name: share for name, share in results["padding"].items() if name not in results["seconds"]}
    lines += [f"| {name} | not measured | {share:.1%} |" for name, share in others.items()]
    lines += [
        "",
        f"{len(next(iter(results['seconds'].values())))} optimizer steps of {shapes['samples_per_step']} samples after "
        f"{WARM_UP} that does not count, {shapes['rows_at_once']} rows of up to {shapes['max_length']} tokens at once. "
        f"Both train the same samples from the same weights, a step of each in turn, in random order, in one process; "
        f"packed, a step has {results['rows_per_step']:.1f} rows. The losses of a step differ by at most "
        f"{results['largest_difference_of_losses']:.1e} of their value.",
        "",
        f"The {data['samples']:,} samples ({data['without_image']} without an image) are drawn from the sources of "
        "LLaVA-1.5's 665,298 in their published proportions; the lengths of their words, which are not published, are "
        "log-normal with medians that we estimated for each source (`MIX665K` in "
        "[packing_speed.py](../../training/packing_speed.py)). All lengths are divided by "
        f"{data['lengths_divided_by']} for a CPU: an image has "
        f"{data['image_tokens']} tokens, a sample {data['mean_tokens']:.0f} on average, a row at most "
        f"{shapes['max_length']}. The model is tiny; the gain depends on how much of a step the decoder takes.",
        "",
        f"- Command: `{results['command']}`",
        f"- Commit: {results['commit'] or 'not a checkout'}{' with changes' if results['dirty'] else ''}",
        f"- Hardware: {machine['processor']}, {machine['cores']} cores, {machine['threads']} thread(s)",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in results['versions'].items())}",
        f"- Every step: [json]({record})",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main)
