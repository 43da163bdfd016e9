"""Answers to lmms-eval's requests by our generator, without importing lmms-eval.

Interface: EvolvingLMMs-Lab/lmms-eval 0.7.3, `ConfigurableMessagesTask.construct_requests` in `lmms_eval/api/task.py`:
the arguments of a request to a chat model are (context, doc_to_messages, generation settings, doc id, task, split).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tqdm import tqdm

from eval.batches import BatchPolicy, BatchQueue
from eval.files import first_of
from eval.generator import Generator
from eval.harnesses.chat_requests import ChatRequest
from eval.harnesses.generation_settings import GenerationSettings
from eval.runner import outcomes
from eval.samples import Prediction


def answer_all(
    requests: Sequence[Any],
    documents: Mapping[str, Any],
    generator: Generator,
    policy: BatchPolicy,
    ignored: Collection[str] = (),
    show_progress: bool = True,
) -> list[Prediction]:
    """Answer lmms-eval's requests, in their order.

    Args:
        requests: with the property `args`, see above.
        documents: [task][split][doc id] -> a row of the task's data.
        generator: answers batches.
        policy: the limits of a batch.
        ignored: generation settings not to be heeded.
        show_progress: draw a progress bar.

    Raises:
        ValueError: a request cannot be understood or asks for what the model does not do, or cannot be answered;
            nothing is left out.
    """
    groups: dict[int, list[ChatRequest]] = defaultdict(list)
    settings: dict[str, GenerationSettings] = {}
    for number, request in enumerate(requests):
        _, doc_to_messages, values, doc_id, task, split = request.args
        # Requests may repeat: several answers to one document, and padding to equal numbers in all processes.
        identifier = f"{task}, {split}, document {doc_id} (request {number})"
        settings[identifier] = GenerationSettings.of(values, task, ignored)
        messages = partial(_messages, doc_to_messages, documents[task][split], doc_id)
        groups[settings[identifier].max_new_tokens].append(ChatRequest.of(identifier, messages))
    predictions, failures = _generate(groups, generator, policy, show_progress)
    if failures:
        reasons = first_of(f"{name}: {reason}" for name, reason in failures.items())
        raise ValueError(f"{len(failures)} of {len(requests)} requests could not be answered: {reasons}")
    return [replace(predictions[name], text=chosen.cut(predictions[name].text)) for name, chosen in settings.items()]


def _messages(doc_to_messages: Any, rows: Any, doc_id: int) -> Any:
    return doc_to_messages(rows[doc_id])


def _generate(
    groups: Mapping[int, Sequence[ChatRequest]], generator: Generator, policy: BatchPolicy, show_progress: bool
) -> tuple[dict[str, Prediction], dict[str, str]]:
    predictions: dict[str, Prediction] = {}
    failures: dict[str, str] = {}
    total = sum(map(len, groups.values()))
    with tqdm(total=total, desc="answers", unit="sample", disable=not show_progress) as progress:
        for max_new_tokens, group in groups.items():
            queue = BatchQueue(group, generator.request_length, policy, max_new_tokens)
            for outcome in outcomes(queue, generator, None, max_new_tokens):
                predictions |= {prediction.id: prediction for prediction in outcome.predictions}
                failures |= outcome.failures
                progress.update(len(outcome.predictions) + len(outcome.failures))
    return predictions, failures
