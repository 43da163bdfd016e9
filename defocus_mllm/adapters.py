"""LoRA adapters with PEFT: what to adapt, what to train and save beside it, and a loader that loses nothing.

PEFT does the work; these functions know the names. PEFT and Transformers load an adapter that lacks weights, or whose
weights fit nothing, with a warning at most (a projector that is missing, with none); here both are errors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .chat_templates import CHAT_TOKENS
from .files import written_whole
from .loading import CheckpointError, load_strictly
from .modeling_defocus import DefocusForConditionalGeneration
from .processing_defocus import DefocusProcessor

NOT_QUANTISED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
"""For `BitsAndBytesConfig(llm_int8_skip_modules=...)`: all but the decoder, with the full names that it needs.

The projector is trained, which 4-bit weights cannot be; the encoder's rates and phases come out of its projections, and
it is small beside a decoder. A list of one's own replaces the default, which is the output layer.
"""

_WEIGHTS = "adapter_model.safetensors"
_DECODER, _ENCODER = "model.language_model", "model.vision_tower"


def add_lora(model: PreTrainedModel, processor: DefocusProcessor, vision: bool = False, **fields: Any) -> PeftModel:
    """`model` with new LoRA adapters by `lora_config`, whose arguments these are; ready for Trainer and TRL."""
    return _wrapped(model, lora_config(model, processor, vision, **fields))


def lora_config(model: PreTrainedModel, processor: DefocusProcessor, vision: bool = False, **fields: Any) -> LoraConfig:
    """A `LoraConfig` for every linear layer of the decoder; the projector and the new embeddings are trained whole.

    Args:
        model: a `DefocusForConditionalGeneration` (any class of that structure, such as the one a checkpoint brings).
        processor: its processor. The embeddings of `<image>` and of the markers of the chat template, which are new to
            most language models, are trained and saved. A model never says these tokens, so their rows of an output
            layer of its own stay as they are.
        vision: adapt the linear layers of the encoder as well, which is frozen otherwise.
        fields: of `LoraConfig`, in place of these defaults and of r=16 and lora_alpha=32.

    Raises:
        ValueError: the decoder has no linear layers (GPT-2), or its output layer is tied and has a bias.
    """
    if model.config.tie_word_embeddings and model.get_output_embeddings().bias is not None:
        raise ValueError("lora_config: the output layer is tied to the embedding and has a bias, which PEFT leaves out")
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    vocabulary = processor.tokenizer.get_vocab()
    rows = {vocabulary[token] for token in (processor.image_token, *CHAT_TOKENS) if token in vocabulary}
    defaults = {
        "task_type": "CAUSAL_LM",
        "r": 16,
        "lora_alpha": 32,
        "target_modules": "|".join(_linear_layers(model, part) for part in (_DECODER, _ENCODER)[: 1 + vision]),
        "modules_to_save": ["multi_modal_projector"],
        "trainable_token_indices": {embedding: sorted(rows)},
    }
    return LoraConfig(**{**defaults, **fields})


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Write the adapter of `model` to `folder`, which must not exist; whole or not at all.

    Raises:
        ValueError: it could not be loaded as it is now: weights were trained that it does not hold, the base model was
            never saved, or its vocabulary has grown since.
        FileExistsError: there is something at `folder`.
    """
    held = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model).values()}
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    lost = [name for name, weight in trained if weight.data_ptr() not in held]
    if lost:
        raise ValueError(
            f"adapter: {len(lost)} trained weights would not be saved, first {lost[0]}; name their module in "
            "modules_to_save (lora_config does so for the projector)"
        )
    base = model.active_peft_config.base_model_name_or_path
    if not base:
        raise ValueError("adapter: its base model was never saved; save it, load it from there and adapt that")
    if (Path(base) / "config.json").is_file():
        saved, now = AutoConfig.from_pretrained(base).text_config.vocab_size, model.config.text_config.vocab_size
        if saved != now:
            raise ValueError(
                f"adapter: the vocabulary has {now} rows, but in {base} {saved}; save the base model again"
            )
    with written_whole(folder) as partial:
        model.save_pretrained(str(partial))


def load_adapter(folder: str | Path, trainable: bool = False) -> PeftModel:
    """The adapter in `folder` on the base model that its adapter_config.json names.

    `.merge_and_unload()` makes one ordinary model of the two.

    Raises:
        FileNotFoundError: the adapter's configuration or weights, or the base model, are not there.
        CheckpointError: weights are missing, or there are some that fit nothing; names the first of them.
    """
    folder = Path(folder)
    for name in ("adapter_config.json", _WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"adapter: {folder} holds no saved adapter (no {name} in it)")
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not trainable
    base = str(config.base_model_name_or_path)
    model = load_strictly(DefocusForConditionalGeneration, base, f"base model of the adapter in {folder}")
    adapted = _wrapped(model, config)
    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        there = set(file.keys())
    needed = set(get_peft_model_state_dict(adapted))
    if missing := sorted(needed - there):
        raise CheckpointError(f"adapter: {folder} lacks {len(missing)} weights, first {missing[0]}")
    if unknown := sorted(there - needed):
        raise CheckpointError(f"adapter: {len(unknown)} weights in {folder} fit nothing, first {unknown[0]}")
    adapted.load_adapter(str(folder), "default", is_trainable=trainable)
    return adapted


def _wrapped(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    adapted = get_peft_model(model, config)
    head: Any = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = None  # PEFT hides it behind the rows of a tied embedding; TRL reads it
    return adapted


def _linear_layers(model: nn.Module, part: str) -> str:
    """A regular expression for the names of the linear layers under the module `part`."""
    modules = dict(model.get_submodule(part).named_modules())
    names = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)}
    if part == _DECODER and any(hasattr(module, "A_log") for module in modules.values()):
        # The kernels of hybrid decoders read the weight of this layer instead of calling it; our Mamba never does.
        names.discard("out_proj")
    if not names:
        raise ValueError(f"lora_config: {part} has no linear layers; write a LoraConfig for it by hand")
    return rf"{re.escape(part)}\.(?:.*\.)?(?:{'|'.join(sorted(names))})"
