"""What `generate` of Transformers does not know about a decoder whose prompt holds images."""

from __future__ import annotations

import copy
from typing import Any

from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin

from .cache_defocus import CACHE_NAME
from .stream_defocus import check_continuation


class DefocusGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a decoder that reads images as tokens of its prompt.

    Answers never contain the placeholder of an image, for which there would be no image. What would give other answers
    than the plain mode, and not say so, is refused.
    """

    config: Any
    model: Any
    _continues = False
    """Whether `check_continuation` has found nothing wrong."""

    def prepare_inputs_for_generation(self, input_ids: Any, inputs_embeds: Any = None, **kwargs: Any) -> dict[str, Any]:
        """As Transformers, but an assistant gets the images of the prompt: its first call counts as a later one."""
        model_inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        cache = model_inputs.get(CACHE_NAME)
        if (images := kwargs.get("mm_encoder_outputs")) and cache is not None and cache.get_seq_length() == 0:
            model_inputs["mm_encoder_outputs"] = images
        return model_inputs

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """As Transformers, for one call of `generate`.

        Raises:
            ValueError: the mode cannot give the answer of the plain one.
        """
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)  # type: ignore[misc]
        # Prompt lookup copies from the prompt, so that without this its drafts would hold placeholders.
        suppressed = {*(generation_config.suppress_tokens or ()), self.config.image_token_id}
        generation_config.suppress_tokens = sorted(suppressed)
        if images := model_kwargs.get("mm_encoder_outputs"):
            # Beams repeat them in place; the caller's must do for the next call.
            model_kwargs["mm_encoder_outputs"] = {name: copy.copy(output) for name, output in images.items()}
        self._check_mode(generation_config, model_kwargs)
        return generation_config, model_kwargs

    def _check_mode(self, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
        """Raise `ValueError` if the mode cannot give the answer of the plain one."""
        cache = model_kwargs.get(CACHE_NAME)
        continues = isinstance(cache, Cache) and cache.get_seq_length() > 0
        in_chunks = generation_config.prefill_chunk_size is not None
        if in_chunks and model_kwargs.get("inputs_embeds") is not None:
            raise ValueError("prefill_chunk_size: inputs_embeds cannot be read in chunks; give input_ids instead")
        has_images = model_kwargs.get("pixel_values") is not None or bool(model_kwargs.get("mm_encoder_outputs"))
        if continues and has_images and max(generation_config.num_beams, generation_config.num_return_sequences) > 1:
            raise ValueError(
                "num_beams, num_return_sequences: with new images, several sequences cannot go on from one cache; "
                "leave the cache out"
            )
        if (continues or in_chunks) and not self._continues:
            check_continuation(self.model.language_model, DynamicCache(config=self.config.text_config))
            self._continues = True


__all__ = ["DefocusGenerationMixin"]
