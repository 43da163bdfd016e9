"""The contrastive part of stage 0: encoder and text encoder learn which image and which text belong together (CLIP)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import torch
from accelerate import PartialState
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoTokenizer, CLIPProcessor, PreTrainedTokenizerBase

from defocus_mllm import DefocusCLIPConfig, DefocusCLIPModel, DefocusImageProcessor, DefocusVisionConfig
from training.arguments import Stage0ContrastiveArguments, require
from training.captioned_images import CaptionColumns, CaptionedImages, format_report, load_captioned_images
from training.language import language_config
from training.sampling import SampleKey
from training.stage import Batch, Stage
from training.stages import usable_samples
from training.tokenizer import train_tokenizer
from training.vision import drop_path_rate_at, vision_config


def build_contrastive(arguments: Stage0ContrastiveArguments) -> Stage:
    """Both encoders, image-text pairs, and the loss among all pairs of a step.

    Raises `ValueError` naming the argument, or the file and record, that cannot be used.
    """
    refuse_accumulation(arguments)
    vision = vision_config(arguments)
    image_processor = DefocusImageProcessor(size={"height": vision.image_size, "width": vision.image_size})
    dataset, usable, left_out = load_checked(arguments, image_processor)
    tokenizer = text_tokenizer(arguments, dataset.texts)
    model = DefocusCLIPModel(clip_config(arguments, vision, tokenizer))

    def encode(indices: Sequence[int]) -> Batch:
        texts = [dataset.texts[index] for index in indices]
        encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def load_batch(keys: Sequence[SampleKey]) -> Batch:
        chosen = [usable[key.sample] for key in keys]
        return {"pixel_values": dataset.pixel_values(chosen), **encode(chosen)}

    def compute_loss(forward: nn.Module, batch: Batch, items: int) -> torch.Tensor:
        # the model returns the mean over this process's pairs
        return forward(**batch, return_loss=True, use_cache=False).loss * (len(batch["input_ids"]) / items)

    def begin_epoch(epoch: int, num_epochs: int) -> None:
        model.vision_model.set_drop_path_rate(drop_path_rate_at(epoch, num_epochs, arguments))

    lines = [format_report(dataset.report), *(f"left out: {message}" for message in left_out)]
    lines.append(describe_lengths(dataset, usable, tokenizer, arguments.check_images))
    lines.append(f"{dataset.pictures.name(usable[0])}: {tokenizer.decode(encode([usable[0]])['input_ids'][0])}")
    return Stage(
        name="stage0_contrastive",
        model=model,
        companions=[CLIPProcessor(image_processor, tokenizer)],
        components={
            "vision_encoder": [model.vision_model],
            "text_encoder": [model.text_model],
            "projections": [model],  # what the two above leave: the projections and the scale
        },
        num_samples=len(usable),
        load_batch=load_batch,
        count_items=lambda batch: len(batch["input_ids"]),
        compute_loss=compute_loss,
        begin_epoch=begin_epoch,
        sample_text="\n".join(lines),
        facts={"data_report": dataset.report, "left_out": left_out},
    )


def load_checked(
    arguments: Stage0ContrastiveArguments, image_processor: DefocusImageProcessor
) -> tuple[CaptionedImages, Sequence[int], list[str]]:
    """Images with texts, which of them can be used, and a message for each other one."""
    columns = CaptionColumns(arguments.image_column, arguments.text_column)
    cache_bytes = arguments.image_cache_megabytes * 1024**2
    dataset = load_captioned_images(arguments.data, image_processor, arguments.on_bad_sample, cache_bytes, columns)
    # what fits the cache is decoded now, while workers can still inherit it
    count = len(dataset) if dataset.loader.fits(len(dataset)) else arguments.check_images
    usable, left_out = usable_samples(len(dataset), count, dataset.pixels, arguments.on_bad_sample)
    return dataset, usable, left_out


def refuse_accumulation(arguments: Stage0ContrastiveArguments) -> None:
    """Raise `ValueError` if a process would take its share of the global batch in several parts.

    Pairs that are not in memory at the same time are not each other's negatives, which would be another loss.
    """
    world_size = PartialState().num_processes
    at_once = arguments.per_device_batch_size * world_size
    require(
        at_once in (0, arguments.global_batch_size),
        f"per_device_batch_size: {arguments.per_device_batch_size} x {world_size} process(es) = {at_once} is not "
        f"global_batch_size {arguments.global_batch_size}, but the pairs of a step are each other's negatives and "
        "cannot be accumulated; leave per_device_batch_size at 0, and start more processes if memory does not suffice",
    )


def clip_config(
    arguments: Stage0ContrastiveArguments, vision: DefocusVisionConfig, tokenizer: PreTrainedTokenizerBase
) -> DefocusCLIPConfig:
    """The model's configuration. Raises `ValueError` if the text encoder has fewer positions than texts have tokens."""
    text = language_config(arguments.text_config, tokenizer)
    positions = getattr(text, "max_position_embeddings", arguments.max_length)
    require(
        arguments.max_length <= positions,
        f"max_length: {arguments.max_length} tokens, but text_config has max_position_embeddings {positions}",
    )
    return DefocusCLIPConfig(vision_config=vision, text_config=text, projection_dim=arguments.projection_dim)


def text_tokenizer(arguments: Stage0ContrastiveArguments, texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """A tokenizer that by itself, here and wherever the model is used, ends each text and cuts it to `max_length`.

    Raises `ValueError` for one without an end-of-text token, or that cannot be made to write it.
    """
    if arguments.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    else:
        with tempfile.TemporaryDirectory(prefix="defocus-tokenizer-") as folder:
            lines = (line for text in texts for line in text.splitlines())
            tokenizer = train_tokenizer(lines, arguments.vocab_size, folder)
    require(
        tokenizer.eos_token is not None, f"tokenizer: {arguments.tokenizer} has no eos_token, which ends every text"
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # never seen: the mask says where a text ends
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = arguments.max_length
    tokenizer.chat_template = None
    if not ends_texts(tokenizer):
        begin, end = tokenizer.bos_token, tokenizer.eos_token
        special = {token: tokenizer.convert_tokens_to_ids(token) for token in filter(None, (begin, end))}
        template = f"{begin or ''} $A {end}".strip()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=template, special_tokens=list(special.items())
        )
    with tempfile.TemporaryDirectory(prefix="defocus-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        kept = ends_texts(AutoTokenizer.from_pretrained(folder))
    require(kept, f"tokenizer: {arguments.tokenizer} cannot be made to end a text with {tokenizer.eos_token!r}")
    return tokenizer


def ends_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the last token of a text is the end-of-text token."""
    return tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id


def describe_lengths(
    dataset: CaptionedImages, usable: Sequence[int], tokenizer: PreTrainedTokenizerBase, limit: int
) -> str:
    """How many tokens the texts have, and how many texts are cut, of up to `limit` evenly spaced over the data."""
    count = max(1, min(len(usable), limit))
    chosen = [usable[number * len(usable) // count] for number in range(count)]
    lengths = [len(ids) for ids in tokenizer([dataset.texts[index] for index in chosen], truncation=False)["input_ids"]]
    longest = tokenizer.model_max_length
    cut = sum(length > longest for length in lengths)
    return (
        f"{count:,} texts checked: {min(lengths)} to {max(lengths)} tokens; {cut:,} are longer than max_length "
        f"{longest} and lose their end"
    )
