"""Chat and images to model inputs; the one place where prompts are rendered, for training and for inference."""

from collections.abc import Sequence
from typing import Any

from transformers.processing_utils import MultiModalData, ProcessorMixin

_AUTO_MAP = {"AutoProcessor": "processing_defocus.DefocusProcessor"}
# What Transformers would take for videos and nothing here reads.
_VIDEO_OPTIONS = {"fps", "do_sample_frames", "video_metadata", "videos_kwargs"}

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


def sample_frames(video: Any, num_frames: int | None = None) -> list[Any]:
    """Frames of a video at even distances, the first among them.

    Args:
        video: a sequence of images (or of their paths or addresses), or an array (frames, height, width, channels) or
            (frames, channels, height, width).
        num_frames: how many; all if None.

    Raises:
        ValueError: `video` is no such thing, or has fewer frames; files are not decoded.
    """
    dimensions = getattr(video, "ndim", None)
    if dimensions is None and (not isinstance(video, Sequence) or isinstance(video, str | bytes)):
        raise ValueError(
            f"video: give its frames, as images or an array, not {type(video).__name__}; decode files first"
        )
    if dimensions not in (None, 4):
        raise ValueError(f"video: an array of frames has 4 dimensions, not {dimensions}")
    count = len(video)
    wanted = count if num_frames is None else num_frames
    if not 1 <= wanted <= count:
        raise ValueError(f"num_frames: {wanted} frames cannot be taken from a video of {count}")
    return [video[place * count // wanted] for place in range(wanted)]


def frames_as_images(conversation: Any, num_frames: int | None = None) -> Any:
    """A conversation, or a batch of them, whose videos are replaced by `sample_frames` of them, as images in order."""
    if isinstance(conversation, list | tuple):
        return [frames_as_images(item, num_frames) for item in conversation]
    if not isinstance(conversation, dict) or not isinstance(conversation.get("content"), list | tuple):
        return conversation
    parts: list[Any] = []
    for part in conversation["content"]:
        if isinstance(part, dict) and part.get("type") == "video":
            parts += [{"type": "image", "image": frame} for frame in sample_frames(part.get("video"), num_frames)]
        else:
            parts.append(part)
    return {**conversation, "content": parts}


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

    def apply_chat_template(
        self,
        conversation: Any,
        *args: Any,
        num_frames: int | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in Transformers. A part {"type": "video", "video": frames} stands for its frames, as images in order.

        Args:
            conversation: messages, or a list of conversations.
            num_frames: how many frames to take of each video, at even distances; all if None. It may also stand in
                `processor_kwargs`.

        Raises:
            ValueError: a video is not given by its frames, or has fewer than `num_frames`.
        """
        processor_kwargs = dict(processor_kwargs or {})
        if unknown := sorted(_VIDEO_OPTIONS & {*processor_kwargs, *kwargs}):
            raise ValueError(f"{unknown[0]}: a video is a list of frames here; num_frames says how many are taken")
        num_frames = processor_kwargs.pop("num_frames", num_frames)
        conversation = frames_as_images(conversation, num_frames)
        kwargs["processor_kwargs"] = processor_kwargs
        return super().apply_chat_template(conversation, *args, **kwargs)

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """As in Transformers, and `ValueError` for what it would leave out without a word."""
        if videos is not None:
            raise ValueError("videos: give the frames as images, with one <image> each, or use apply_chat_template")
        if audio is not None:
            raise ValueError("audio: the model reads images and text alone")
        super().validate_inputs(images=images, text=text, **kwargs)

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


__all__ = ["DEFAULT_CHAT_TEMPLATE", "DefocusProcessor", "frames_as_images", "sample_frames"]
