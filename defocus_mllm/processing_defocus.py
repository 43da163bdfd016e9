"""Chat and images to model inputs; the one place where prompts are rendered, for training and for inference."""

from collections.abc import Sequence
from typing import Any

from transformers.processing_utils import MultiModalData, ProcessorMixin

_AUTO_MAP = {"AutoProcessor": "processing_defocus.DefocusProcessor"}

# Parts of a message are joined by a newline, so [image, text] reads "<image>\nWhat is this?" as in LLaVA's data. What
# the model is to generate, and nothing else, stands between {% generation %} and {% endgeneration %}: training labels
# are read off these marks.
DEFAULT_CHAT_TEMPLATE = """\
{%- macro parts(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if not loop.first -%}{{ '\\n' }}{%- endif -%}
{%- if part['type'] == 'image' -%}{{ '<image>' }}{%- elif part['type'] == 'text' -%}{{ part['text'] }}
{%- else -%}{{ raise_exception('content parts must be of type image or text, not ' ~ part['type']) }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- bos_token or '' -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|>' -}}{%- generation -%}{{- parts(message['content']) -}}{{- eos_token -}}{%- endgeneration -%}
{%- elif message['role'] in ('system', 'user') -%}
{{- '<|' ~ message['role'] ~ '|>' -}}{{- parts(message['content']) -}}{{- eos_token -}}
{%- else -%}{{ raise_exception('roles are system, user and assistant, not ' ~ message['role']) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


class DefocusProcessor(ProcessorMixin):
    """Image processor and tokenizer in one; `<image>` in the text becomes as many placeholders as an image has tokens.

    Args:
        image_processor: a `DefocusImageProcessor`.
        tokenizer: a tokenizer with `<image>` as a special token.
        num_image_tokens: tokens of one image, `DefocusVisionConfig.num_image_tokens`.
        chat_template: Jinja template; `DEFAULT_CHAT_TEMPLATE` if None.
        image_token: the placeholder.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 197,
        chat_template: str | None = None,
        image_token: str = "<image>",
        **kwargs: Any,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.image_token = getattr(tokenizer, "image_token", None) or image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer has no token {self.image_token!r}; add it as a special token")
        template = chat_template or DEFAULT_CHAT_TEMPLATE.replace("<image>", self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=template)
        self.auto_map = dict(_AUTO_MAP)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """Return the placeholders that stand for image `image_idx` in the text."""
        return self.image_token * self.num_image_tokens

    def prompt_ids(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The ids of a rendered conversation up to the answer, with a single placeholder for each image.

        With `num_image_tokens` placeholders in the place of each they are the `input_ids` that `apply_chat_template`
        gives with the images, which are not needed here.
        """
        prompt = self.apply_chat_template(list(messages), add_generation_prompt=True)
        bos = self.tokenizer.bos_token
        # As Transformers does: a template that begins with the token for it has seen to all special tokens.
        has_special_tokens = bos is not None and prompt.startswith(bos)
        return self.tokenizer(prompt, add_special_tokens=not has_special_tokens).input_ids

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)


__all__ = ["DEFAULT_CHAT_TEMPLATE", "DefocusProcessor"]
