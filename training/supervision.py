"""What a stage trains on: one example out of a conversation, a batch out of examples, and a look at both.

Rules: only answers and the end of turn behind each are learnt; a conversation that is too long loses whole trailing
question/answer pairs, never its image or half an answer; whatever is dropped is counted.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from training.bad_samples import BAD_SAMPLES, SAMPLE_ERRORS, BadSample, encode
from training.conversations import Conversation, Message
from training.encoding import IGNORED, Example, SupervisionError, encoder_for, message_parts
from training.sampling import SampleKey


def encode_conversation(processor: Any, messages: list[Message], record: str = "the conversation") -> Example:
    """One training example.

    Args:
        processor: a `DefocusProcessor`.
        messages: Hugging Face structured messages; image parts hold a path or a PIL image under "image".
        record: how an error calls the conversation.

    Returns `input_ids`, `attention_mask` and `labels`, each (tokens,), and, if there are images, `pixel_values`
    (images, 3, height, width). Labels are the token itself in answers and the end of turn behind each, -100
    elsewhere. Raises SupervisionError if nothing is supervised, ImageError or FileNotFoundError for a bad image; all
    name `record`.
    """
    return encoder_for(processor).encode(messages, record)


def describe_supervision(tokenizer: Any, example: Example) -> str:
    """The example as text, what is learnt in `[[...]]`, repeated image tokens counted: for the log."""
    ids, labels = example["input_ids"].tolist(), example["labels"].tolist()
    pieces: list[str] = []
    begin = 0
    for end in range(1, len(ids) + 1):
        kind = _kind(tokenizer, ids[begin], labels[begin])
        if end < len(ids) and _kind(tokenizer, ids[end], labels[end]) == kind:
            continue
        text = tokenizer.decode(ids[begin:end])
        if kind == "image":
            text = f"{tokenizer.image_token} x {end - begin}"
        pieces.append(f"[[{text}]]" if kind == "supervised" else text)
        begin = end
    supervised = sum(label != IGNORED for label in labels)
    pictures = tuple(example["pixel_values"].shape) if "pixel_values" in example else "none"
    return f"{len(ids)} tokens, {supervised} supervised (in [[...]]), pixel values {pictures}\n{''.join(pieces)}"


def _kind(tokenizer: Any, token_id: int, label: int) -> str:
    if token_id == getattr(tokenizer, "image_token_id", None):
        return "image"
    return "context" if label == IGNORED else "supervised"


def pad_examples(examples: Sequence[Example], pad_token_id: int) -> Example:
    """`input_ids`, `attention_mask`, `labels` (batch, longest), padded on the right; padding is not supervised."""
    padding = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED}
    return {
        name: pad_sequence([example[name] for example in examples], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }


def pack_examples(rows: Sequence[Sequence[Example]], pad_token_id: int) -> Example:
    """Examples in a row one after the other, each with positions of its own; rows are padded on the right.

    Returns `input_ids`, `position_ids`, `attention_mask` and `labels`, each (rows, longest). Positions begin at 0 in
    every example, by which Transformers tells them apart if it gets no `attention_mask`; that one marks padding, each
    token of which has position 0 and so stands alone. The first token of an example is not learnt, since what stands
    before it in the row does not belong to it; in a row of its own nothing predicts it either.
    """
    packed = []
    for row in rows:
        labels = [example["labels"].clone() for example in row]
        for of_example in labels:
            of_example[0] = IGNORED
        packed.append(
            {
                "input_ids": torch.cat([example["input_ids"] for example in row]),
                "attention_mask": torch.cat([example["attention_mask"] for example in row]),
                "labels": torch.cat(labels),
                "position_ids": torch.cat([torch.arange(len(example["input_ids"])) for example in row]),
            }
        )
    positions = pad_sequence([row["position_ids"] for row in packed], batch_first=True)
    return {**pad_examples(packed, pad_token_id), "position_ids": positions}


def nothing_to_learn(pad_token_id: int) -> Example:
    """The example that keeps a batch's place where a conversation cannot be used: one token, not supervised."""
    return {
        "input_ids": torch.tensor([pad_token_id]),
        "attention_mask": torch.ones(1, dtype=torch.long),
        "labels": torch.tensor([IGNORED]),
    }


class ConversationCollator:
    """Conversations to one right-padded batch.

    Args:
        processor: a `DefocusProcessor`.
        shuffle_turns: put the question/answer pairs of a conversation in a new order each time; the image stays in
            front. Conversations with a picture elsewhere than before the first question keep their order.
        max_turns: at most so many pairs of a conversation (after shuffling); None for all.
        max_length: at most so many tokens of a conversation, image tokens included; None for no limit.
        seed: with (epoch, index) of a sample it decides the order of its pairs, whatever the batch and the process.
        skip_bad: a conversation that cannot be encoded becomes an example of which nothing is learnt, and the batch
            tells of it under `BAD_SAMPLES`; otherwise it is an error.

    Raises ValueError naming the argument that is out of range.
    """

    def __init__(
        self,
        processor: Any,
        shuffle_turns: bool = False,
        max_turns: int | None = None,
        max_length: int | None = None,
        seed: int = 0,
        skip_bad: bool = False,
    ) -> None:
        for name, value in (("max_turns", max_turns), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, not {value}")
        self.pad_token_id = processor.tokenizer.pad_token_id
        if self.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token; set one, different from the end of turn")
        self.processor, self.skip_bad = processor, skip_bad
        self.shuffle_turns, self.max_turns, self.max_length, self.seed = shuffle_turns, max_turns, max_length, seed
        self.counts: Counter[str] = Counter()
        """Pairs left out (`over_max_turns`, `over_max_length`) and conversations that could not be shuffled
        (`kept_in_order`), over all calls in this process."""

    def __call__(
        self, conversations: Sequence[Conversation], keys: Sequence[SampleKey] | None = None
    ) -> dict[str, torch.Tensor]:
        """A batch of `conversations`; `keys` are their (epoch, index), needed for `shuffle_turns`.

        Returns `input_ids`, `attention_mask`, `labels` (batch, tokens), padded on the right, and, if there are images,
        `pixel_values` (all images in order of their placeholders, 3, height, width). Raises SupervisionError naming a
        conversation whose first pair alone is longer than `max_length`, or that has nothing to learn.
        """
        examples, bad = self._examples(conversations, keys)
        return _with_pictures(pad_examples(examples, self.pad_token_id), examples, bad)

    def pack(
        self, rows: Sequence[Sequence[Conversation]], keys: Sequence[Sequence[SampleKey]]
    ) -> dict[str, torch.Tensor]:
        """A batch whose rows hold several conversations each; `keys` are theirs, row by row.

        Returns what `pack_examples` does, and `pixel_values` as from a call. Raises as a call does.
        """
        made = [self._examples(*row) for row in zip(rows, keys, strict=True)]
        batch = pack_examples([examples for examples, _ in made], self.pad_token_id)
        in_order = [example for examples, _ in made for example in examples]
        return _with_pictures(batch, in_order, [sample for _, bad in made for sample in bad])

    def _examples(
        self, conversations: Sequence[Conversation], keys: Sequence[SampleKey] | None
    ) -> tuple[list[Example], list[BadSample]]:
        """An example of each, and those of which nothing can be learnt."""
        if self.shuffle_turns and keys is None:
            raise ValueError("shuffle_turns needs the keys, (epoch, index) of each conversation")
        examples: list[Example] = []
        bad: list[BadSample] = []
        for position, conversation in enumerate(conversations):
            try:
                examples.append(self.example(conversation, keys[position] if keys is not None else None))
            except SAMPLE_ERRORS as error:
                if not self.skip_bad:
                    raise
                bad.append(conversation.bad(error))
                examples.append(nothing_to_learn(self.pad_token_id))
        return examples, bad

    def example(self, conversation: Conversation, key: SampleKey | None = None) -> Example:
        """The turns of a conversation that are trained on, encoded. Raises what `encode_conversation` raises."""
        return encode_conversation(self.processor, self.choose_turns(conversation, key), conversation.record)

    def count_tokens(self, conversation: Conversation, key: SampleKey | None = None) -> int:
        """Length of the conversation's example, without opening an image; what is left out of it counts in `counts`."""
        messages = self.choose_turns(conversation, key)
        return encoder_for(self.processor).count_tokens(messages, conversation.record)

    def choose_turns(self, conversation: Conversation, key: SampleKey | None = None) -> list[Message]:
        """The messages trained on: shuffled, then cut to `max_turns` pairs and to `max_length` tokens."""
        system, pairs = _split_pairs(conversation)
        if self.shuffle_turns and key is not None and len(pairs) > 1:
            pairs = self._shuffle(self._drop_overlong(system, pairs), key)
        if self.max_turns is not None and len(pairs) > self.max_turns:
            self.counts["over_max_turns"] += len(pairs) - self.max_turns
            pairs = pairs[: self.max_turns]
        if self.max_length is not None:
            pairs = self._cut_to_length(system, pairs, conversation.record)
        return system + [message for pair in pairs for message in pair]

    def _shuffle(self, pairs: list[list[Message]], key: SampleKey) -> list[list[Message]]:
        pictures, first_question = _split_leading_images(pairs[0][0])
        questions = [first_question, *(pair[0] for pair in pairs[1:])]
        if any(part["type"] == "image" for question in questions for part in message_parts(question)):
            self.counts["kept_in_order"] += 1
            return pairs
        order = list(range(len(pairs)))
        random.Random(key.seed(self.seed)).shuffle(order)
        shuffled = [[questions[index], *pairs[index][1:]] for index in order]
        front = shuffled[0][0]
        shuffled[0] = [front | {"content": pictures + message_parts(front)}, *shuffled[0][1:]]
        return shuffled

    def _length(self, system: list[Message], pairs: list[list[Message]]) -> int:
        return encoder_for(self.processor).count_tokens(system + [message for pair in pairs for message in pair])

    def _drop_overlong(self, system: list[Message], pairs: list[list[Message]]) -> list[list[Message]]:
        """Without pairs that are too long even alone with the images: put first, they would leave nothing to learn."""
        if self.max_length is None or self._length(system, pairs) <= self.max_length:
            return pairs
        pictures, first_question = _split_leading_images(pairs[0][0])
        bare = [[first_question, *pairs[0][1:]], *pairs[1:]]
        alone = [[pair[0] | {"content": pictures + message_parts(pair[0])}, *pair[1:]] for pair in bare]
        fitting = [index for index, pair in enumerate(alone) if self._length(system, [pair]) <= self.max_length]
        if not fitting:
            return pairs
        self.counts["over_max_length"] += len(pairs) - len(fitting)
        return [alone[fitting[0]], *(bare[index] for index in fitting[1:])]

    def _cut_to_length(self, system: list[Message], pairs: list[list[Message]], record: str) -> list[list[Message]]:
        assert self.max_length is not None
        for kept in range(len(pairs), 0, -1):
            length = self._length(system, pairs[:kept])
            if length <= self.max_length:
                self.counts["over_max_length"] += len(pairs) - kept
                return pairs[:kept]
        raise SupervisionError(
            f"{record}: its first question and answer take {length} tokens, more than max_length {self.max_length};"
            f" raise max_length to {length} or remove the record"
        )


def _with_pictures(batch: Example, examples: Sequence[Example], bad: Sequence[BadSample]) -> dict[str, torch.Tensor]:
    """The batch with the pictures of all examples, in the order of their placeholders, and what is told of bad ones."""
    pictures = [example["pixel_values"] for example in examples if "pixel_values" in example]
    if pictures:
        batch["pixel_values"] = torch.cat(pictures)
    if bad:
        batch[BAD_SAMPLES] = encode(bad)
    return batch


def _split_pairs(conversation: Conversation) -> tuple[list[Message], list[list[Message]]]:
    """The system message, if any, and the (question, answer) pairs."""
    messages = conversation.messages
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    dialogue = messages[len(system) :]
    roles = [message["role"] for message in dialogue]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise SupervisionError(f"{conversation.record}: user and assistant must take turns, user first, assistant last")
    return system, [dialogue[start : start + 2] for start in range(0, len(dialogue), 2)]


def _split_leading_images(question: Message) -> tuple[list[dict[str, Any]], Message]:
    """The images before the question's first text, and the question without them."""
    parts = message_parts(question)
    count = next((index for index, part in enumerate(parts) if part["type"] != "image"), 0)
    return parts[:count], question | {"content": parts[count:]}
