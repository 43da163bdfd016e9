"""The model `defocus_mllm` of lmms-eval: any image-text-to-text checkpoint, answered as `eval.run` answers.

    python -m lmms_eval --model defocus_mllm --model_args pretrained=DIR --batch_size auto --tasks ...

Interface: EvolvingLMMs-Lab/lmms-eval 0.7.3, `lmms_eval/api/model.py` and `lmms_eval/evaluator.py`. Only lmms-eval
imports this module; see docs/harnesses.md.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger

from eval.batches import DEFAULT_SAMPLES, DEFAULT_TOKENS, BatchPolicy
from eval.harnesses.generation_settings import DEFAULT_NEW_TOKENS
from eval.harnesses.lmms_answers import answer_all
from eval.run import generator_of_process


class DefocusMllm(lmms):
    """Greedy answers of a checkpoint, in batches sorted by length; one copy of the model in every process.

    Args:
        pretrained: folder written by `save_pretrained` of model and processor, or USER/NAME[@REVISION] on the Hub.
        device: "cpu", "cuda", ...; None deals the GPUs out to the processes, or takes the CPU.
        dtype: number format of the weights, such as bfloat16; "auto" keeps the saved one.
        batch_size: most samples in a batch (lmms-eval's own default is 1), or "auto".
        max_batch_size: most samples where `batch_size` is "auto".
        batch_tokens: most tokens in a batch, images, padding and answers included.
        ignore: generation settings of tasks not to be heeded, joined by "+".
        world_size: how many processes the launcher was asked for.

    Raises:
        ValueError: an argument is unknown or senseless, weights are missing or damaged, or there are more or fewer than
            `world_size` processes.
        FileNotFoundError: `pretrained` holds no checkpoint.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        batch_tokens: int = DEFAULT_TOKENS,
        ignore: str = "",
        world_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(f"--model_args: unknown {', '.join(sorted(unknown))}")
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if world_size not in (None, self._world_size):
            raise ValueError(
                f"--model_args world_size={world_size}: the launcher started {self._world_size}; on CPUs take "
                f"torchrun --nproc_per_node {world_size} -m lmms_eval, accelerate launch --cpu starts one"
            )
        self._policy = BatchPolicy(_samples(batch_size, max_batch_size), batch_tokens)
        self._ignored = [name for name in str(ignore).split("+") if name]
        local, number = int(os.environ.get("LOCAL_WORLD_SIZE", self._world_size)), int(os.environ.get("LOCAL_RANK", 0))
        self.generator = generator_of_process(str(pretrained), device, dtype, local, number)
        if self._ignored:
            logger.warning(f"generation settings not heeded, as asked for: {', '.join(self._ignored)}")

    @property
    def device(self) -> torch.device:
        """Where the model is, and what lmms-eval counts requests with."""
        return self.generator.device

    @property
    def batch_size(self) -> int:
        """Most samples in a batch."""
        return self._policy.samples

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self.generator.processor.tokenizer

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """One `GenerationResult` for each request, in their order; ValueError as `answer_all`."""
        if unlimited := sorted({r.task_name for r in requests if r.args[2].get("max_new_tokens") is None}):
            logger.warning(
                f"{', '.join(unlimited)}: no max_new_tokens is set; answers end at {DEFAULT_NEW_TOKENS} tokens"
            )
        predictions = answer_all(
            requests, self.task_dict, self.generator, self._policy, self._ignored, show_progress=self.rank == 0
        )
        return [
            GenerationResult(prediction.text, TokenCounts(prediction.n_in, prediction.n_out))
            for prediction in predictions
        ]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Not available: lmms-eval 0.7.3 cannot read a likelihood back."""
        raise NotImplementedError(
            "defocus_mllm: lmms-eval 0.7.x turns the likelihoods of multiple_choice and loglikelihood tasks into text "
            "and fails; score options with python -m eval.run --likelihood"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Not available: every request here is answered once."""
        raise NotImplementedError(
            "defocus_mllm: tasks of several rounds are not supported, because each prompt depends on the answer before "
            "it and cannot be batched by length; choose a generate_until task, or talk to the model with "
            "defocus-mllm chat"
        )


def _samples(batch_size: int | str, max_batch_size: int | None) -> int:
    """Most samples of a batch; ValueError for what is neither a positive number nor "auto"."""
    if batch_size == "auto":
        return max_batch_size or DEFAULT_SAMPLES
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise ValueError(f"--batch_size must be a positive number or auto, found {batch_size!r}")
    return int(batch_size)
