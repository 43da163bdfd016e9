"""Chat and images to model inputs; the one place where prompts are rendered, for training and for inference."""

from collections.abc import Sequence
from typing import Any

from transformers.processing_utils import MultiModalData, ProcessorMixin

from .chat_defocus import Chat, ChatEncoder

_AUTO_MAP = {"AutoProcessor": "processing_defocus.DefocusProcessor"}
# What Transformers would take for videos and nothing here reads.
_VIDEO_OPTIONS = ("fps", "do_sample_frames", "video_metadata", "videos_kwargs")

# Parts of a message are joined by a newline, so [image, text] reads "<image>\nWhat is this?" as in LLaVA's data.
PARTS_MACRO = """\
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
"""

# What the model is to generate, and nothing else, stands between {% generation %} and {% endgeneration %}, for other
# trainers: here an answer is what follows the prompt, see chat_defocus.
DEFAULT_CHAT_TEMPLATE = (
    PARTS_MACRO
    + """\
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
)

# How the text of a batch is laid out, of all that Transformers takes; the only such options when texts are special.
_LAYOUT = ("padding", "padding_side", "max_length", "pad_to_multiple_of")
_NOT_OF_THE_TEMPLATE = (
    "tokenize",
    "return_dict",
    "return_tensors",
    "processor_kwargs",
    "return_assistant_tokens_mask",
    "add_generation_prompt",
    "continue_final_message",
    "load_audio_from_video",
    *_LAYOUT,
)


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
        self._chat_encoders: dict[tuple[str, int], ChatEncoder] = {}

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As `ProcessorMixin.__call__`, and `ValueError` for what it would leave out without a word."""
        if kwargs.pop("videos", None) is not None:
            raise ValueError("videos: give the frames as images, with one <image> each, or use apply_chat_template")
        if kwargs.pop("audio", None) is not None:
            raise ValueError("audio: the model reads images and text alone")
        return super().__call__(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """Return the placeholders that stand for image `image_idx` in the text."""
        return self.image_token * self.num_image_tokens

    def apply_chat_template(  # type: ignore[override]  # all others by name
        self,
        conversation: Any,
        chat_template: str | None = None,
        num_frames: int | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in Transformers; with `tokenize=True` the ids are those of `encode_chat`.

        These differ from the tokenizer's for the rendered text only where a message holds what looks like a control
        token, or where a token would reach across the beginning of an answer. `return_assistant_tokens_mask` works
        with every template: without `{% generation %}` in it, it says what training learns. A part
        {"type": "video", "video": frames} stands for its frames, as images in order.

        Args:
            conversation: messages, or a list of conversations.
            chat_template: another template than the processor's.
            num_frames: how many frames to take of each video, at even distances; all if None. It may also stand in
                `processor_kwargs`.
            processor_kwargs: as in Transformers.

        Raises:
            ValueError: a video is not given by its frames, or has fewer than `num_frames`; `encode_chat` raises
                (ChatError); a conversation whose ids are not the tokenizer's is to be truncated.
        """
        processor_kwargs = dict(processor_kwargs or {})
        for name in _VIDEO_OPTIONS:
            if processor_kwargs.pop(name, kwargs.pop(name, None)) is not None:
                raise ValueError(f"{name}: a video is a list of frames here; num_frames says how many are taken")
        conversation = frames_as_images(conversation, processor_kwargs.pop("num_frames", num_frames))
        kwargs.pop("sanitize_control_tokens", None)  # which is done in any case
        kwargs["processor_kwargs"] = processor_kwargs
        if not kwargs.get("tokenize"):
            return super().apply_chat_template(conversation, chat_template, **kwargs)
        conversations = conversation if _is_batch(conversation) else [conversation]
        variables = {name: value for name, value in kwargs.items() if name not in _NOT_OF_THE_TEMPLATE}
        prompt, unfinished = kwargs.get("add_generation_prompt", False), kwargs.get("continue_final_message", False)
        chats = [
            self.encode_chat(messages, prompt, chat_template, continue_final_message=unfinished, **variables)
            for messages in conversations
        ]
        encoder = self.chat_encoder(chat_template)
        alike = all(chat.safe and encoder.whole_ids(chat.text) == chat.ids for chat in chats)
        if alike and (encoder.has_marks or not kwargs.get("return_assistant_tokens_mask")):
            return super().apply_chat_template(conversation, chat_template, **kwargs)
        # The pictures and everything else from Transformers, for messages that nothing can be mistaken in.
        safely = [encoder.mark_safely(messages) for messages in conversations]
        return self._with_ids(safely, chat_template, chats, kwargs)

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> Chat:
        """A conversation as ids, with what is answered in it and a single placeholder for each image.

        The prompt of a question and the ids of its answer are the beginning of the whole conversation's ids, and no
        text of a message becomes a control token: see `chat_defocus`. `variables` go to the template.

        Raises ChatError (a ValueError) if that cannot be had with this template and tokenizer.
        """

        def render(part: Sequence[dict[str, Any]], prompt: bool) -> str:
            unfinished = continue_final_message and len(part) == len(messages)
            return super(DefocusProcessor, self).apply_chat_template(
                list(part),
                chat_template,
                add_generation_prompt=prompt,
                continue_final_message=unfinished,
                **variables,
            )

        remember = not variables and not continue_final_message
        return self.chat_encoder(chat_template).encode(messages, render, add_generation_prompt, remember)

    def prompt_ids(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The ids of a conversation up to the answer, with a single placeholder for each image.

        With `num_image_tokens` placeholders in the place of each they are the `input_ids` that `apply_chat_template`
        gives with the images, which are not needed here.
        """
        return self.encode_chat(messages, add_generation_prompt=True).ids

    def chat_encoder(self, chat_template: str | None = None) -> ChatEncoder:
        """What encodes conversations with this template, the processor's own if None."""
        template = self._resolve_chat_template(chat_template)
        key = (template, len(self.tokenizer))  # a token may have been added
        if self._chat_encoders.get(key) is None:
            self._chat_encoders = {key: ChatEncoder(self.tokenizer, template)}
        return self._chat_encoders[key]

    def _with_ids(
        self, conversations: list[Any], chat_template: str | None, chats: list[Chat], options: dict[str, Any]
    ) -> Any:
        """What Transformers makes of the conversations, with the ids of `chats` in the place of its own."""
        arguments = dict(options.get("processor_kwargs") or {})
        layout = {**options, **arguments, **arguments.pop("text_kwargs", {})}
        if layout.get("truncation"):
            raise ValueError("truncation would cut an answer or an image; leave out messages instead")
        layout = {name: layout[name] for name in _LAYOUT if layout.get(name) is not None}
        tensors = options.get("return_tensors")
        given = arguments.pop("return_tensors", None)
        others = {name: value for name, value in options.items() if name not in _LAYOUT}
        others |= {"return_dict": True, "return_tensors": None, "return_assistant_tokens_mask": False}
        others["processor_kwargs"] = {name: value for name, value in arguments.items() if name not in _LAYOUT}
        output: Any = super().apply_chat_template(conversations, chat_template, **others)
        text = self.tokenizer.pad(
            {"input_ids": [self.expand_images(chat.ids, chat.ids) for chat in chats]}, **{"padding": False, **layout}
        )
        output.update(text)
        if "mm_token_type_ids" in output:
            output["mm_token_type_ids"] = self.create_mm_token_type_ids(output["input_ids"])
        if options.get("return_assistant_tokens_mask"):
            masks = [iter(self.expand_images(chat.ids, [int(said) for said in chat.answered])) for chat in chats]
            output["assistant_masks"] = [
                [next(mask) if read else 0 for read in row]
                for mask, row in zip(masks, output["attention_mask"], strict=True)
            ]
        output.convert_to_tensors(tensor_type=given if tensors in (None, "auto") else tensors)
        return output if options.get("return_dict") else output["input_ids"]

    def expand_images(self, ids: list[int], values: list[int]) -> list[int]:
        """`values`, one for each of `ids`, with those of images repeated for all their tokens."""
        return [
            value
            for token, value in zip(ids, values, strict=True)
            for _ in range(self.num_image_tokens if token == self.image_token_id else 1)
        ]

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)


def _is_batch(conversation: Any) -> bool:
    return isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")


__all__ = ["DEFAULT_CHAT_TEMPLATE", "DefocusProcessor", "frames_as_images", "sample_frames"]
