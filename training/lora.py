"""LoRA and QLoRA in training: adapters put into a model, what of it then learns, and how their checkpoints are read.

A checkpoint is PEFT's: `adapter_config.json`, which names the base model, and `adapter_model.safetensors` with the
low-rank matrices, the projector and the rows of new tokens. Every checkpoint of a run has all of them, not only the
last one. `AutoModelForImageTextToText.from_pretrained` loads it, `defocus-mllm merge` makes an ordinary model of it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig

from defocus_mllm import DefocusForConditionalGeneration, DefocusProcessor
from defocus_mllm.adapter_base import describe_base, write_base_record
from defocus_mllm.adapters import NOT_QUANTISED, lora_config
from defocus_mllm.loading import CheckpointError, load_strictly
from training.sharding import original_class, shard_like
from training.tuning_arguments import TuningArguments

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_WHOLE = {"projector": "multi_modal_projector", "vision_tower": "vision_tower"}

Parts = dict[str, list[nn.Module]]


class AdapterWriter:
    """Saves the adapter in a model, where the model itself would save all its weights.

    Args:
        model: what `add_lora` has put an adapter into.
        base: folder of the model before that.
        quantization: how its weights were loaded.
    """

    def __init__(self, model: DefocusForConditionalGeneration, base: str, quantization: str) -> None:
        self._model, self._base, self._quantization = model, base, quantization

    @cached_property
    def _base_record(self) -> dict[str, str]:
        return describe_base(self._base, self._quantization)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], /, state_dict: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Write the adapter's weights, of `state_dict` if given, its configuration, and `base_model.json`."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            f"{_PREFIX}{name}": tensor.contiguous()
            for name, tensor in _adapter_weights(self._model, state_dict).items()
        }
        save_file(weights, folder / _WEIGHTS, {"format": "pt"})
        self._model.peft_config["default"].save_pretrained(str(folder))  # type: ignore[operator, union-attr]
        self._model.generation_config.save_pretrained(folder)
        write_base_record(folder, self._base_record)


def add_lora(
    model: DefocusForConditionalGeneration, processor: DefocusProcessor, arguments: TuningArguments, train: list[str]
) -> None:
    """Put adapters into `model`, in place: its class, its forward pass and its names for everything else stay.

    Args:
        train: what learns, of projector, language_model and vision_tower. Those that get no adapter learn whole: a copy
            of theirs is trained, and the original stays beside it.

    Raises `ValueError` for a language model that cannot be adapted.
    """
    adapted = {"language_model"} | ({"vision_tower"} if arguments.lora_vision else set())
    config = lora_config(
        model,
        processor,
        vision=arguments.lora_vision,
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha or 2 * arguments.lora_rank,
        lora_dropout=arguments.lora_dropout,
    )
    config.modules_to_save = [_WHOLE[name] for name in train if name not in adapted] or None
    config.base_model_name_or_path = model.name_or_path
    inject_adapter_in_model(config, model)


def is_adapted(model: nn.Module) -> bool:
    """Whether there are adapters in `model`."""
    return "peft_config" in vars(model)


def adapted_components(parts: Parts) -> Parts:
    """The components of a model with adapters, for the freeze table: each of `parts` in its frozen and its new half.

    `X_lora` are X's low-rank matrices, `new_tokens` rows of the embedding. A part that is trained
    whole keeps its name; what stays of it before training is `X_before`.
    """
    components: Parts = {}
    for name, modules in parts.items():
        found = [module for part in modules for module in part.modules()]
        copies = [module for module in found if isinstance(module, ModulesToSaveWrapper)]
        new: Parts = {
            f"{name}_lora": [part for module in found if isinstance(module, LoraLayer) for part in _lora_parts(module)],
            "new_tokens": [
                cast(nn.Module, module.token_adapter.trainable_tokens_delta)
                for module in found
                if isinstance(module, TrainableTokensWrapper)
            ],
            name: [module.modules_to_save for module in copies],
        }
        components |= {kind: members for kind, members in new.items() if members}
        components[f"{name}_before" if name in components else name] = modules
    return components


def _lora_parts(layer: Any) -> list[nn.Module]:
    """What learns of an adapter, and its dropout, which is on when it does."""
    return [layer.lora_A, layer.lora_B, layer.lora_dropout]


def trained_components(components: Iterable[str], train: list[str]) -> list[str]:
    """Those of `adapted_components` that learn when `train` does."""
    names = list(components)
    learning = {f"{name}_lora" if f"{name}_lora" in names else name for name in train}
    if "language_model" in train:
        learning |= {"new_tokens"}
    return [name for name in names if name in learning]


def load_adapter_weights(model: nn.Module, directory: str | Path) -> None:
    """Copy the adapter saved in `directory` into `model`, bit for bit; `CheckpointError` when they do not fit."""
    path = Path(directory) / _WEIGHTS
    try:
        saved = load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {directory}: {_WEIGHTS} is missing or damaged: {error}") from error
    own = {f"{_PREFIX}{name}": tensor for name, tensor in _adapter_weights(model).items()}
    if different := sorted(set(saved) ^ set(own)):
        where = "lacks" if different[0] in own else "has, but the model lacks,"
        raise CheckpointError(f"checkpoint {directory} {where} {different[0]} ({len(different)} such differences)")
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise CheckpointError(
                f"checkpoint {directory}: {name} has shape {tuple(saved[name].shape)}, not {tuple(tensor.shape)}"
            )
        tensor.copy_(shard_like(saved[name], tensor))


def load_adapted(model: Any, directory: str | Path) -> DefocusForConditionalGeneration:
    """The base model of the adapter in `directory` with the adapter, a new model like `model`.

    Raises `CheckpointError` or `FileNotFoundError` when one of the two is not there or does not fit.
    """
    config = PeftConfig.from_pretrained(str(directory))
    options = {}
    if quantization := getattr(model.config, "quantization_config", None):
        options = {"quantization_config": quantization, "device_map": {"": model.device}}
    base = str(config.base_model_name_or_path)
    loaded = load_strictly(original_class(model), base, "base model", next(model.parameters()).dtype, **options)
    inject_adapter_in_model(config, loaded)
    load_adapter_weights(loaded, directory)
    return loaded


def _adapter_weights(model: nn.Module, state_dict: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Name -> the tensor itself, not a copy, of all that an adapter's checkpoint holds."""
    return get_peft_model_state_dict(model, state_dict, save_embedding_layers=False)


def quantization_options(quantization: str) -> dict[str, Any]:
    """What `from_pretrained` needs to load a model so quantised; empty for "none".

    The values are QLoRA's (arXiv 2305.14314): 4-bit NormalFloat, the scales quantised again, computed in bfloat16.

    Raises `ValueError` where the library or the GPU is missing, before anything is loaded.
    """
    if quantization == "none":
        return {}
    if not torch.cuda.is_available():
        raise ValueError(f"quantization: {quantization} needs a CUDA GPU; leave it at none here")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"quantization: {quantization} needs bitsandbytes: pip install 'defocus-mllm[bitsandbytes]'")
    return {"quantization_config": nf4_config(), "device_map": {"": PartialState().device}}


def nf4_config() -> BitsAndBytesConfig:
    """The decoder's linear layers in 4 bits, all else as it is."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(NOT_QUANTISED),
    )
