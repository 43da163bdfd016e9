"""Stage 0: the encoder learns to see, and a small language model learns its first words.

    accelerate launch training/stage0.py --task language --config training/recipes/easy_vqa.yaml \\
        --text data/easy_vqa/text.txt --output_dir outputs/stage0_language
    accelerate launch training/stage0.py --task classification --config training/recipes/easy_vqa.yaml \\
        --data data/easy_vqa/images/train/metadata.jsonl --output_dir outputs/stage0_vision

Also as `python -m training.stage0`. `--task` chooses the half and with it the recipe's section, `stage0_language` or
`stage0_vision`. Where a pre-trained language model is given to stages 1 and 2, the language half is not needed.
The result loads with `AutoModelForCausalLM` + `AutoTokenizer`, or with `AutoModelForImageClassification` and
`DefocusVisionModel` + `AutoImageProcessor`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from defocus_mllm import DefocusForImageClassification, DefocusImageProcessor, DefocusVisionConfig
from training.argument_parsing import check_names, parse_arguments
from training.arguments import Stage0LanguageArguments, Stage0VisionArguments
from training.augmentation import Augmentation
from training.console import run_script
from training.encoding import IGNORED
from training.labelled_images import collate_labelled_images, format_report, load_labelled_images
from training.loop import Batch, Stage, count_supervised
from training.sampling import SampleKey, mix_seed
from training.stages import run_stage, usable_samples
from training.tokenizer import read_texts, train_tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Run the half that `--task` names."""
    words = list(sys.argv[1:] if argv is None else argv)
    if chosen_task(words) == "language":
        arguments = parse_arguments(Stage0LanguageArguments, "stage0_language", words)
        run_stage("stage0_language", arguments, build_language)
    else:
        run_stage("stage0_vision", parse_arguments(Stage0VisionArguments, "stage0_vision", words), build_vision)


def chosen_task(argv: Sequence[str]) -> str:
    """Value of `--task` in `argv`. Raises `ValueError` when it is absent."""
    for position, word in enumerate(argv):
        if word == "--task" and position + 1 < len(argv):
            return argv[position + 1]
        if word.startswith("--task="):
            return word.partition("=")[2]
    if "-h" in argv or "--help" in argv:
        return "classification"
    raise ValueError("command line: --task is missing; give --task classification or --task language")


# --- vision -----------------------------------------------------------------------------------------------------------


def build_vision(arguments: Stage0VisionArguments) -> Stage:
    """Encoder with main and auxiliary head, labelled images, augmentation and the drop path schedule."""
    config = vision_config(arguments)
    image_processor = DefocusImageProcessor(size={"height": config.image_size, "width": config.image_size})
    dataset = load_labelled_images(arguments.data, image_processor, arguments.on_bad_sample)
    config.problem_type = dataset.problem_type  # type: ignore[assignment]  # one of the two it may be
    config.id2label = dataset.id2label
    config.label2id = {name: number for number, name in dataset.id2label.items()}
    usable, left_out = usable_samples(
        len(dataset), arguments.check_images, dataset.__getitem__, arguments.on_bad_sample
    )
    model = DefocusForImageClassification(config)
    augmentation = Augmentation(arguments.horizontal_flip, arguments.vertical_flip, arguments.max_shift)

    def load_batch(keys: Sequence[SampleKey]) -> Batch:
        batch = collate_labelled_images([dataset[usable[key.sample]] for key in keys])
        generator = torch.Generator().manual_seed(mix_seed(arguments.seed, 2, *keys[0]))
        return {**batch, "pixel_values": augmentation(batch["pixel_values"], generator)}

    def count_known(batch: Batch) -> int:
        return int((batch["labels"] >= 0).sum())

    def compute_loss(forward: nn.Module, batch: Batch, items: int) -> torch.Tensor:
        # the model returns the mean over the micro-batch's known labels
        return forward(**batch).loss * (count_known(batch) / items)

    def begin_epoch(epoch: int, num_epochs: int) -> None:
        model.set_drop_path_rate(drop_path_rate_at(epoch, num_epochs, arguments))

    lines = [format_report(dataset.report), *(f"left out: {message}" for message in left_out)]
    lines.append(f"{dataset.paths[usable[0]]}: {dataset.labels[usable[0]].tolist()} of {dataset.label_names}")
    return Stage(
        name="stage0_vision",
        model=model,
        companions=[image_processor],
        components={
            "encoder": [model.encoder],
            "heads": [head for head in (model.head, model.head2) if head is not None],
        },
        num_samples=len(usable),
        load_batch=load_batch,
        count_items=count_known,
        compute_loss=compute_loss,
        begin_epoch=begin_epoch,
        sample_text="\n".join(lines),
        facts={"data_report": dataset.report, "left_out": left_out},
    )


def vision_config(arguments: Stage0VisionArguments) -> DefocusVisionConfig:
    """The encoder's configuration: a preset's fields, overridden by the recipe's."""
    fields = {**arguments.vision_config, "drop_path_rate": arguments.drop_path_rate}
    fields["min_drop_path_rate"] = arguments.min_drop_path_rate
    preset = fields.pop("preset", None)
    return DefocusVisionConfig.from_preset(preset, **fields) if preset else DefocusVisionConfig(**fields)


def drop_path_rate_at(epoch: int, num_epochs: int, arguments: Stage0VisionArguments) -> float:
    """Rate of the deepest block in an epoch: linear from the minimum in the first to the maximum in the last epoch.

    Source: De-focus Attention Networks, the released training loop (constant inside an epoch).
    """
    progress = epoch / (num_epochs - 1) if num_epochs > 1 else 1.0
    span = arguments.drop_path_rate - arguments.min_drop_path_rate
    return arguments.min_drop_path_rate + span * min(1.0, progress)


# --- language ---------------------------------------------------------------------------------------------------------


def build_language(arguments: Stage0LanguageArguments) -> Stage:
    """A decoder-only model built from `text_config`, a tokenizer, and the text, one line a sample."""
    texts = read_texts(arguments.text)
    if arguments.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    else:
        with tempfile.TemporaryDirectory(prefix="defocus-tokenizer-") as folder:
            tokenizer = train_tokenizer(texts, arguments.vocab_size, folder)
    sequences = [
        [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]
    ]
    for number, sequence in enumerate(sequences):
        if len(sequence) > arguments.max_length:
            raise ValueError(
                f"{arguments.text}: the sample {texts[number][:60]!r} has {len(sequence)} tokens, more than max_length "
                f"{arguments.max_length}; split it or raise max_length"
            )
    model = AutoModelForCausalLM.from_config(language_config(arguments, tokenizer))

    def load_batch(keys: Sequence[SampleKey]) -> Batch:
        return pad_right([sequences[key.sample] for key in keys], tokenizer.pad_token_id)

    def compute_loss(forward: nn.Module, batch: Batch, items: int) -> torch.Tensor:
        return forward(**batch, num_items_in_batch=items).loss

    return Stage(
        name="stage0_language",
        model=model,
        companions=[tokenizer],
        components={"language_model": [model]},
        num_samples=len(sequences),
        load_batch=load_batch,
        count_items=count_supervised,
        compute_loss=compute_loss,
        unit="tokens",
        sample_text=f"[{tokenizer.decode(sequences[0])}]  (every token after the first is supervised)",
        facts={"texts": len(texts), "vocabulary": len(tokenizer)},
    )


def language_config(arguments: Stage0LanguageArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration `text_config` describes, with the tokenizer's vocabulary and special tokens.

    Raises `ValueError` naming a field that this kind of model does not have.
    """
    fields = dict(arguments.text_config)
    kind = fields.pop("model_type")
    try:
        valid = AutoConfig.for_model(kind).to_dict()
    except ValueError as error:
        raise ValueError(f"text_config: unknown model_type {kind!r}") from error
    check_names(fields, sorted(valid), "text_config")
    fields.setdefault("vocab_size", len(tokenizer))
    if fields["vocab_size"] < len(tokenizer):
        raise ValueError(f"text_config: vocab_size {fields['vocab_size']} is below the tokenizer's {len(tokenizer)}")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return AutoConfig.for_model(kind, **{**special, **fields})


def pad_right(sequences: Sequence[Sequence[int]], pad_token_id: int) -> Batch:
    """`input_ids`, `attention_mask`, `labels`, each (batch, longest); padding is masked and not supervised."""
    longest = max(len(sequence) for sequence in sequences)
    input_ids = torch.full((len(sequences), longest), pad_token_id)
    labels = torch.full_like(input_ids, IGNORED)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        labels[row, : len(sequence)] = input_ids[row, : len(sequence)]
    lengths = torch.tensor([[len(sequence)] for sequence in sequences])
    return {"input_ids": input_ids, "attention_mask": (torch.arange(longest) < lengths).long(), "labels": labels}


if __name__ == "__main__":
    run_script(main)
