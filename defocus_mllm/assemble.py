"""An MLLM put together from a De-focus encoder and any causal language model of Transformers.

Only the projector, and the embeddings of tokens that the tokenizer lacked, are new. What cannot work is refused before
anything is written, and the finished model is held against the language model it was made of.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .assemble_checks import check_logits, check_reading
from .chat_templates import DEFAULT, IMAGE_TOKEN, TOKENIZER, ChosenTemplate, choose_template, end_ids
from .configuration_defocus import DefocusConfig, DefocusVisionConfig
from .configuration_defocus_clip import DefocusCLIPConfig
from .image_processing_defocus import DefocusImageProcessor
from .loading import load_strictly
from .modeling_defocus import DefocusForConditionalGeneration, DefocusMultiModalProjector
from .modeling_defocus_clip import DefocusCLIPModel
from .modeling_defocus_vision import DefocusVisionModel
from .processing_defocus import DefocusProcessor

ProjectorType = Literal["linear", "mlp2x_gelu"]


@dataclass
class Assembly:
    """A model, its processor, and what had to be added to make them fit."""

    model: DefocusForConditionalGeneration
    processor: DefocusProcessor
    notes: list[str]


def assemble(
    vision: tuple[DefocusVisionModel, DefocusImageProcessor],
    language: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    projector_type: ProjectorType,
    names: tuple[str, str],
    chat_template: str = DEFAULT,
) -> Assembly:
    """Put an encoder and a causal language model together; both are used as they are, not copied.

    Args:
        vision: an encoder and its image processor, from `load_encoder` or `new_encoder`.
        language: a causal language model and its tokenizer, from `load_language`; both may grow.
        projector_type: see `DefocusConfig`.
        names: how messages call the two.
        chat_template: one of `chat_templates.NAMES`, or a file `*.jinja`.

    Raises:
        ValueError: the two do not go together; the message begins with the name of the one to exchange.
    """
    language_model, tokenizer = language
    template = choose_template(chat_template, tokenizer)
    notes = complete_tokenizer(tokenizer, language_model, names[1], template)
    model = join(vision[0], language_model, tokenizer.get_vocab()[IMAGE_TOKEN], projector_type)
    check_context(model.config, names)
    check_logits(model, language_model, names[1])
    check_reading(model, language_model, names[1])
    processor = DefocusProcessor(vision[1], tokenizer, model.config.num_image_tokens, template.text)
    for name in ("bos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    model.generation_config.eos_token_id = end_ids(processor)
    return Assembly(model, processor, notes)


def change_template(model: DefocusForConditionalGeneration, processor: DefocusProcessor, name: str) -> list[str]:
    """Give a finished model another chat template, with the tokens this needs; returns log lines.

    Raises `ValueError` or `FileNotFoundError`, beginning with "chat_template", for a name that stands for none.
    """
    if name == TOKENIZER:
        raise ValueError(
            f"chat_template: {TOKENIZER!r} is for a language model with its own tokenizer; this model has its template "
            "already, which stays if none is named"
        )
    template = choose_template(name, processor.tokenizer)
    notes = complete_tokenizer(processor.tokenizer, model, "model", template)
    processor.chat_template = template.text.replace(IMAGE_TOKEN, processor.image_token)
    model.generation_config.eos_token_id = end_ids(processor)
    return notes


def new_encoder(preset: str, dtype: torch.dtype) -> tuple[DefocusVisionModel, DefocusImageProcessor]:
    """An encoder of a published size with random weights, in `dtype` but for what float32 is kept for."""
    config = DefocusVisionConfig.from_preset(preset)
    encoder: Any = DefocusVisionModel(config)
    return encoder.to(dtype), DefocusImageProcessor(size={"height": config.image_size, "width": config.image_size})


def model_type_of(folder: str, name: str) -> str:
    """The `model_type` of the model saved in `folder`.

    Raises `FileNotFoundError` if there is none, `ValueError` if its config.json is damaged; both begin with `name`.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{name}: {folder} holds no saved model (no config.json in it)")
    try:
        return str(json.loads(file.read_text(encoding="utf-8")).get("model_type"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{name}: {file} is no configuration: {error}") from error


def load_encoder(vision: str, name: str, dtype: torch.dtype) -> tuple[DefocusVisionModel, DefocusImageProcessor]:
    """The encoder in `vision`, saved alone, with classification heads, or as a part of a contrastive model.

    Raises `FileNotFoundError` or `ValueError`, beginning with `name`.
    """
    kind = model_type_of(vision, name)
    if kind == DefocusCLIPConfig.model_type:
        encoder = load_strictly(DefocusCLIPModel, vision, name, dtype).vision_model
    elif kind == DefocusVisionConfig.model_type:
        encoder = load_strictly(DefocusVisionModel, vision, name, dtype)
    else:
        raise ValueError(f"{name}: {vision} holds a {kind!r}, not a De-focus encoder")
    if not any((Path(vision) / file).is_file() for file in ("preprocessor_config.json", "processor_config.json")):
        raise FileNotFoundError(f"{name}: {vision} has no preprocessor_config.json, which says how pixels are prepared")
    image_processor = DefocusImageProcessor.from_pretrained(vision)
    size, expected = image_processor.size, encoder.config.image_size
    if (size["height"], size["width"]) != (expected, expected):
        raise ValueError(
            f"{name}: in {vision} the image processor makes {size['height']} x {size['width']} pixels, but the encoder "
            f"takes {expected} x {expected}; set size in preprocessor_config.json"
        )
    return encoder, image_processor


def load_language(language: str, name: str, dtype: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model in `language`, in evaluation mode, and its tokenizer, which pads on the left.

    Raises `FileNotFoundError` or `ValueError`, beginning with `name`.
    """
    check_language(language, name)
    try:
        # Generation needs padding on the left, and this is what is saved; training pads on the right by itself.
        tokenizer = AutoTokenizer.from_pretrained(language, local_files_only=True, padding_side="left")
    except Exception as error:  # Transformers raises whatever the missing file leads to
        raise ValueError(f"{name}: the tokenizer in {language} cannot be loaded: {error}") from error
    if tokenizer.eos_token is None:
        raise ValueError(f"{name}: the tokenizer in {language} has no eos_token, which ends every turn")
    return load_strictly(AutoModelForCausalLM, language, name, dtype).eval(), tokenizer


def check_language(language: str, name: str) -> None:
    """Refuse, from the files alone, what is no decoder-only language model of Transformers with a tokenizer.

    Raises `FileNotFoundError` or `ValueError`, beginning with `name`.
    """
    kind, folder = model_type_of(language, name), Path(language)
    if kind not in CONFIG_MAPPING_NAMES:
        raise ValueError(
            f"{name}: {language} is a {kind!r}, which the installed Transformers does not have; a model that brings "
            "its own code is not supported"
        )
    config = AutoConfig.from_pretrained(language, local_files_only=True)
    if config.is_encoder_decoder:
        raise ValueError(f"{name}: {language} is an encoder-decoder ({kind!r}); a decoder-only model is needed")
    if config.get_text_config() is not config:
        raise ValueError(f"{name}: {language} is multimodal already ({kind!r}); take a language model alone")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{name}: {language} is a {kind!r}, which is no causal language model")
    if "mrope_section" in str(getattr(config, "rope_parameters", None)):
        raise ValueError(
            f"{name}: {language} ({kind!r}) has positions in three dimensions (mrope_section), but pixels and words "
            "are one sequence here; take a language model with ordinary positions"
        )
    if not any(next(folder.glob(pattern), None) for pattern in ("tokenizer*", "*.model", "vocab.*", "tekken.json")):
        raise FileNotFoundError(f"{name}: {language} has no tokenizer; save the model's tokenizer in the same folder")


def complete_tokenizer(
    tokenizer: PreTrainedTokenizerBase, language: PreTrainedModel, name: str, template: ChosenTemplate
) -> list[str]:
    """Add the special tokens that a chat template needs and a foreign language model lacks; returns log lines.

    The vocabulary grows only if its padding (rows beyond the tokenizer's tokens) does not suffice. In either case
    `initialise_rows` gives the new tokens their values, since those of padding were never trained.
    """
    rows = language.get_input_embeddings().weight.size(0)  # type: ignore[operator, union-attr]
    known = min(len(tokenizer), rows)
    missing = [token for token in template.tokens if token not in tokenizer.get_vocab()]
    added: dict[str, Any] = {"extra_special_tokens": missing} if missing else {}
    if tokenizer.pad_token is None:
        added["pad_token"] = "<pad>"
    notes = []
    if tokenizer.chat_template:
        if template.name != TOKENIZER:
            new = "the one of De-focus MLLM" if template.name == DEFAULT else template.name
            notes.append(f"the chat template of {name} is replaced by {new}")
        tokenizer.chat_template = None  # the processor has it
    if added:
        tokenizer.add_special_tokens(added, replace_extra_special_tokens=False)
        names = [*missing, *(["<pad>"] if "pad_token" in added else [])]
        notes.append(f"added to the tokenizer of {name}: {', '.join(names)} ({len(tokenizer)} tokens now)")
    if len(tokenizer) > rows:
        language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        notes.append(f"the vocabulary of {name} grows from {rows} to {len(tokenizer)} rows")
    if len(tokenizer) < rows:
        notes.append(f"{rows - len(tokenizer)} of {rows} rows of the vocabulary of {name} are padding, without a token")
    if len(tokenizer) > known:
        initialise_rows(language, known, len(tokenizer))
        notes.append(f"rows {known} to {len(tokenizer) - 1} of the vocabulary are new: the mean row, a little varied")
    return notes


@torch.no_grad()
def initialise_rows(language: PreTrainedModel, known: int, tokens: int) -> None:
    """Give tokens `known` to `tokens` - 1 values that no other token has: near the mean of those before them.

    A row of the output layer at the mean takes little of the probability of all others, where a random one might take
    most. A tenth of the deviation tells the new tokens apart, in 16 bits too; the same in every run.
    """
    generator = torch.Generator().manual_seed(0)
    layers = [language.get_input_embeddings(), language.get_output_embeddings()]
    weights = {id(layer.weight): layer.weight for layer in layers}  # once, where they are tied
    for weight in weights.values():
        deviation, mean = torch.std_mean(weight[:known], dim=0)
        noise = torch.randn(tokens - known, weight.size(1), generator=generator)
        weight[known:tokens] = mean + 0.1 * deviation * noise.to(weight)
    bias = getattr(layers[1], "bias", None)
    if bias is not None:
        bias[known:tokens] = bias[:known].mean()


def join(
    encoder: DefocusVisionModel, language: PreTrainedModel, image_token_id: int, projector_type: ProjectorType
) -> DefocusForConditionalGeneration:
    """The MLLM whose parts are `encoder`, a new projector and the decoder and output layer of `language`."""
    head: Any = language.get_output_embeddings()
    config = DefocusConfig(
        vision_config=encoder.config,
        text_config=language.config,
        projector_type=projector_type,
        image_token_id=image_token_id,
        lm_head_bias=getattr(head, "bias", None) is not None,
    )
    # Without weights of its own: those of the parts would be twice in memory, and initialising them takes minutes.
    with torch.device("meta"):
        model = DefocusForConditionalGeneration(config)
    model.model.vision_tower = encoder
    model.model.language_model = language.base_model
    model.lm_head = head
    projector = DefocusMultiModalProjector(config)
    projector.apply(model._init_weights)
    model.model.multi_modal_projector = projector.to(language.dtype)
    return model.eval()


def check_context(config: PreTrainedConfig, names: tuple[str, str]) -> None:
    """Raise `ValueError` if an image alone fills the context of the language model."""
    limit = getattr(config.text_config, "max_position_embeddings", None)
    if limit is not None and config.num_image_tokens >= limit:
        raise ValueError(
            f"{names[0]}: an image has {config.num_image_tokens} tokens, but {names[1]} reads no more than {limit}"
        )
