"""A stream of conversations as stages 1 and 2 take it: the first one looked at now, batches made as they come."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from defocus_mllm import DefocusProcessor
from training.arguments import MultimodalArguments
from training.bad_samples import SAMPLE_ERRORS, BadSamples
from training.batching import Batching
from training.conversation_stream import (
    ConversationReader,
    StreamedConversation,
    open_conversation_stream,
    sampler_of,
    streamed_batch,
)
from training.conversations import Conversation, SourceOptions
from training.encoding import Example
from training.rehearsal import CheckedSamples
from training.sampling import SampleKey
from training.stage import Batch, count_supervised
from training.supervision import ConversationCollator, describe_supervision


class StreamedSamples:
    """Conversations of a stream, and how batches are made of them; made like `training.multimodal.Samples`.

    Raises what opening the data, or its first usable conversation, raises.
    """

    def __init__(self, processor: DefocusProcessor, arguments: MultimodalArguments) -> None:
        self.bad = BadSamples(arguments.on_bad_sample, arguments.max_bad_samples)
        self.num_samples = arguments.num_samples or arguments.max_steps * arguments.global_batch_size
        self.bad.num_records = self.num_samples
        stream = open_conversation_stream(SourceOptions(**arguments.sources()[0]))
        self.collate = ConversationCollator(
            processor,
            arguments.shuffle_turns,
            arguments.max_turns or None,
            arguments.max_length,
            arguments.seed,
            self.bad.skips,
        )
        reader = ConversationReader(stream, arguments.seed, arguments.shuffle_buffer, self.bad)
        self.batching = Batching((), self.load_batch, partial(sampler_of, reader))
        self.report: dict[str, Any] = {"file": stream.where, "shards": stream.rows.num_shards}
        self.left_out: list[str] = []
        self.checked = CheckedSamples()
        self._first = self._encode_first(ConversationReader(stream, arguments.seed, 0, self.bad))
        self.checked.add(self._first)

    def _encode_first(self, reader: ConversationReader) -> Example:
        for seen, (conversation, _) in enumerate(reader.rows(0)):
            try:
                return self._encoded(conversation)
            except SAMPLE_ERRORS as error:
                if not self.bad.skips or seen > self.bad.allowed:
                    raise ValueError(f"{conversation.source}: {error}") from error
        raise AssertionError("passes have no end")

    def _encoded(self, conversation: Conversation) -> Example:
        return self.collate.example(conversation, SampleKey(0, 0))

    def load_batch(self, samples: Sequence[StreamedConversation]) -> Batch:
        """For `Stage.load_batch`."""
        return streamed_batch(self.collate, samples)

    def count_items(self, batch: Batch) -> int:
        """For `Stage.count_items`."""
        self.bad.take_from(batch)
        return count_supervised(batch)

    def first(self) -> Example:
        """The first one that can be used, as it is trained on."""
        return self._first

    def describe(self) -> list[str]:
        """Lines for the log."""
        example = describe_supervision(self.collate.processor.tokenizer, self._first)
        return [f"{self.report['file']}: a stream of {self.report['shards']} shards", example]
