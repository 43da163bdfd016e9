"""The multimodal LLM: De-focus encoder, projector, any decoder-only LLM; pixels and words under one causal mask."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Cache
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import accepts_precomputed_kwargs, can_return_tuple

from .cache_defocus import CACHE_NAME, given_cache
from .card_defocus import DefocusCardModel
from .checks_defocus import check_all
from .configuration_defocus import DefocusConfig
from .decoder_defocus import finish_logits, scale_embeddings
from .generation_defocus import DefocusGenerationMixin
from .modeling_defocus_vision import DefocusVisionModel
from .stream_defocus import DefocusStream

_ONE_PLACEHOLDER = "use one <image> per image, let DefocusProcessor expand it, and leave out what a cache holds already"


@dataclass
class DefocusModelOutputWithPast(BaseModelOutputWithPast):
    """Output of `DefocusModel`.

    Attributes:
        image_hidden_states: projected image tokens of all images in order, (image tokens, text hidden).
        image_outputs: the output of the encoder; its `pooler_output` holds the projected tokens of each image.
    """

    image_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class DefocusCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of `DefocusForConditionalGeneration`.

    Attributes:
        loss: cross-entropy of the next token over labels other than -100; scalar.
        logits: (batch, tokens kept, vocabulary).
        past_key_values: the cache of the language model (from Transformers 5.24 on also `cache`).
        hidden_states, attentions: of the language model, if asked for.
        image_hidden_states: projected image tokens of all images in order, (image tokens, text hidden).
        image_outputs: the output of the encoder; its `pooler_output` holds the projected tokens of each image.
    """

    image_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


class DefocusMultiModalProjector(nn.Module):
    """Maps encoder tokens to word embeddings: (..., vision hidden) to (..., text hidden)."""

    def __init__(self, config: DefocusConfig) -> None:
        super().__init__()
        vision_size, text_size = config.vision_config.hidden_size, config.text_config.hidden_size
        self.linear_1 = nn.Linear(vision_size, text_size)
        self.linear_2 = nn.Linear(text_size, text_size) if config.projector_type == "mlp2x_gelu" else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        projected = self.linear_1(hidden_states)
        return projected if self.linear_2 is None else self.linear_2(nn.functional.gelu(projected))


class DefocusPreTrainedModel(DefocusCardModel):
    """Weight initialisation and loading shared by the multimodal models."""

    config: DefocusConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012 - Transformers declares these as class attributes
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: `_init_weights` leaves loaded weights alone, so Transformers need not skip modules to protect them.

        It would skip those without weights of their own, and some decoders (Falcon-H1) fill buffers there that no
        checkpoint holds.
        """
        return False

    def load_adapter(self, peft_model_id: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, whose `from_pretrained` calls it; what is only a warning there is an error here.

        Raises:
            ValueError: the adapter lacks weights that its configuration promises, or has some that fit nothing.
        """
        report = super().load_adapter(peft_model_id, *args, **kwargs)
        weights = dict(self.named_parameters(remove_duplicate=False))
        loaded = {id(weight) for name, weight in weights.items() if name not in report.missing_keys}
        # Rows of an embedding that is the output layer as well have two names, and are saved under one.
        missing = {name for name in report.missing_keys if id(weights[name]) not in loaded}
        for fault, names in (("lacks", missing), ("has unknown", report.unexpected_keys)):
            if names:
                raise ValueError(f"adapter {peft_model_id}: {fault} weights ({len(names)}, first {min(names)})")
        return report

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only the projector and the output layer are ours; the encoder and the language model initialise themselves.
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=getattr(self.config.text_config, "initializer_range", 0.02))
            if module.bias is not None:
                init.zeros_(module.bias)


class DefocusModel(DefocusPreTrainedModel):
    """Encoder, projector and language model without its output layer."""

    def __init__(self, config: DefocusConfig) -> None:
        super().__init__(config)
        if config.vision_config._attn_implementation not in (None, "eager"):
            # A back end for the language model alone, such as flash attention, must not stop the encoder.
            config.vision_config._attn_implementation = "sdpa"
        self.vision_tower = DefocusVisionModel._from_config(config.vision_config)
        self.multi_modal_projector = DefocusMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def __getattr__(self, name: str) -> Any:
        if name == "generate":
            raise AttributeError(
                "DefocusModel has no output layer and cannot generate: load it with AutoModelForImageTextToText"
            )
        return super().__getattr__(name)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    @accepts_precomputed_kwargs("image")
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode and project images.

        Args:
            pixel_values: (images, channels, image_size, image_size), or (sequences, frames, channels, ...) where the
                encoder is to go on from frame to frame, see `DefocusVisionModel.forward`.

        Returns:
            The encoder's output, whose `pooler_output` is replaced by a list with one (image tokens, text hidden)
            tensor per image (frame): patches, registers and class token in this order.
        """
        outputs, image_tokens = self._encode(pixel_values, **kwargs)
        if pixel_values.ndim == 5:
            image_tokens = image_tokens.unflatten(1, (pixel_values.shape[1], -1)).flatten(0, 1)
        outputs["pooler_output"] = list(image_tokens)
        return outputs

    def _encode(self, pixel_values: torch.Tensor, **kwargs: Any) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        """The encoder's output, and the projected tokens as one tensor (images or sequences, tokens, text hidden).

        A list of them would be as long as there are images, for each number of which a model is compiled.
        """
        outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        return outputs, self.multi_modal_projector(outputs.last_hidden_state)

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Return where image tokens go, (batch, tokens, 1), after checking that there are as many as features.

        Raises:
            ValueError: the number of placeholders differs from the number of image tokens, or the width of an image
                token from that of a word.
        """
        if input_ids is None:
            image_token = torch.full((), self.config.image_token_id, device=inputs_embeds.device)
            placeholders = (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)
        else:
            placeholders = input_ids == self.config.image_token_id
        expected, width = image_features.shape
        if width != inputs_embeds.shape[-1]:
            raise ValueError(f"image tokens have {width} channels, but words have {inputs_embeds.shape[-1]}")
        check_all(
            placeholders.sum() == expected,
            _ONE_PLACEHOLDER,
            lambda: f"the text has {placeholders.sum()} image placeholders but the images give {expected} tokens",
        )
        return placeholders.unsqueeze(-1)

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        image_features: torch.Tensor | None,
    ) -> torch.Tensor:
        """Word embeddings with image tokens in place of their placeholders."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if image_features is not None:
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            placeholders = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            return inputs_embeds.masked_scatter(placeholders, image_features)
        if input_ids is not None:
            no_placeholder = (input_ids != self.config.image_token_id).all()
            check_all(no_placeholder, "the text has image placeholders, but no image was given")
        return inputs_embeds

    def _images(
        self, pixel_values: torch.Tensor | None, images: BaseModelOutputWithPooling | None, kwargs: dict[str, Any]
    ) -> tuple[BaseModelOutputWithPooling | None, torch.Tensor | None]:
        """What the encoder returned or now returns, and all image tokens one after the other; None without images."""
        if images is not None:
            if len(images["pooler_output"]) == 0:  # what beams leave where images and text do not match
                raise ValueError(f"the images are not those that the text has placeholders for; {_ONE_PLACEHOLDER}")
            return images, torch.cat(list(images["pooler_output"]))
        if pixel_values is None:
            return None, None
        wanted = {name: kwargs[name] for name in ("output_hidden_states", "output_attentions") if name in kwargs}
        images_given = pixel_values.shape[0] > 0
        if not images_given:
            pixel_values = pixel_values.new_zeros(1, *pixel_values.shape[1:])
        images, image_tokens = self._encode(pixel_values, **wanted)
        if not images_given:  # of a blank image: the encoder has taken part, with zero gradients
            image_tokens = image_tokens[:0]
        images["pooler_output"] = image_tokens
        return images, image_tokens.flatten(0, 1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> DefocusModelOutputWithPast:
        """Run the language model over words and image tokens as one causal sequence.

        Args:
            input_ids: (batch, tokens), `image_token_id` where image tokens go; or `inputs_embeds`.
            pixel_values: (images, channels, image_size, image_size), in the order of their placeholders; or sequences
                of frames, see `get_image_features`. With 0 images the encoder reads a blank one that nothing sees:
                processes that share a model must all run the same layers, also those whose batch has no image.
            past_key_values, cache: the cache of the language model, under its old or its new name.
            mm_encoder_outputs: {"image": output of `get_image_features`} instead of `pixel_values`.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`; placeholders and image tokens differ.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        images, image_features = self._images(pixel_values, (mm_encoder_outputs or {}).get("image"), kwargs)
        cache = given_cache(past_key_values, cache)
        inputs_embeds = self._embed(input_ids, inputs_embeds, image_features)
        outputs = self.language_model(
            inputs_embeds=scale_embeddings(inputs_embeds, self.config.text_config),
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        return DefocusModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.get("attentions"),  # decoders without attention have no such field
            image_hidden_states=image_features,
            image_outputs=images,
        )


class DefocusForConditionalGeneration(DefocusPreTrainedModel, DefocusGenerationMixin):
    """`DefocusModel` with the output layer: answers questions about images."""

    def __init__(self, config: DefocusConfig) -> None:
        super().__init__(config)
        self.model = DefocusModel(config)
        # Drafts cannot be taken back from recurrent states, which Transformers 5.23 knows by this alone.
        self._is_stateful = self.model.language_model._is_stateful
        sizes = (config.text_config.hidden_size, config.text_config.vocab_size)
        self.lm_head = nn.Linear(*sizes, bias=config.lm_head_bias)
        # Decoders name their input embedding differently, so the tie is found rather than written down.
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()
        # Under tensor parallelism the head is split where the decoder's plan splits the embedding, which it may be.
        if name in self.tp_plan:
            self.tp_plan["lm_head"] = "colwise_gather_output"

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See `DefocusModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def open_stream(
        self, processor: Any = None, frames: bool = False, attention_window: int | None = None
    ) -> DefocusStream:
        """Return an empty stream: it reads pixels as they arrive and answers at any point; see `DefocusStream`."""
        return DefocusStream(self, processor, frames, attention_window)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> DefocusCausalLMOutputWithPast:
        """Predict the next token; see `DefocusModel.forward` for the inputs.

        Args:
            labels: (batch, tokens), the input ids with -100 where nothing is to be learned; shifted inside.
            logits_to_keep: how many last positions get logits (0: all), or their indices.
            num_items_in_batch: divide the summed loss by this number of supervised tokens instead of their count here.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=given_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        logits = finish_logits(logits, self.config.text_config)
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return DefocusCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            image_outputs=outputs.image_outputs,
        )


__all__ = ["DefocusForConditionalGeneration", "DefocusModel", "DefocusPreTrainedModel"]
