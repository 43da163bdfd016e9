"""Stage 0: the encoder learns to see, and a small language model learns its first words.

    accelerate launch training/stage0.py --task language --config training/recipes/easy_vqa.yaml \\
        --text data/easy_vqa/dialogues.json --output_dir outputs/stage0_language
    accelerate launch training/stage0.py --task classification --config training/recipes/easy_vqa.yaml \\
        --data data/easy_vqa/images/train/metadata.jsonl --output_dir outputs/stage0_vision
    accelerate launch training/stage0.py --task contrastive --config training/recipes/clip_defocus_mamba_base32.yaml \\
        --data pairs/metadata.jsonl --tokenizer clip-tokenizer --output_dir outputs/stage0_contrastive

Also as `python -m training.stage0`. `--task` chooses the part and with it the recipe's section, `stage0_language`,
`stage0_vision` or `stage0_contrastive`: the encoder learns from labels or from texts. Where a pre-trained language
model is given to stages 1 and 2, the language part is not needed.
The result loads with `AutoModelForCausalLM` + `AutoTokenizer`, with `AutoModelForImageClassification` and
`DefocusVisionModel` + `AutoImageProcessor`, or with `DefocusCLIPModel` + `AutoProcessor`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from defocus_mllm.console import run_script
from training.argument_parsing import parse_arguments
from training.arguments import Stage0ContrastiveArguments, Stage0LanguageArguments, Stage0VisionArguments
from training.contrastive import build_contrastive
from training.language import build_language
from training.stages import run_stage
from training.vision import build_vision

TASKS: dict[str, tuple[str, Any, Any]] = {
    "classification": ("stage0_vision", Stage0VisionArguments, build_vision),
    "contrastive": ("stage0_contrastive", Stage0ContrastiveArguments, build_contrastive),
    "language": ("stage0_language", Stage0LanguageArguments, build_language),
}
"""`--task` -> section of a recipe, its arguments, and what builds the stage from them."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the part that `--task` names."""
    words = list(sys.argv[1:] if argv is None else argv)
    section, arguments_class, build = TASKS[chosen_task(words)]
    run_stage(section, parse_arguments(arguments_class, section, words), build)


def chosen_task(argv: Sequence[str]) -> str:
    """Value of `--task` in `argv`. Raises `ValueError` when it is absent or unknown."""
    given = ""
    for position, word in enumerate(argv):
        if word == "--task" and position + 1 < len(argv):
            given = argv[position + 1]
        elif word.startswith("--task="):
            given = word.partition("=")[2]
    if not given and ("-h" in argv or "--help" in argv):
        return "classification"
    if given not in TASKS:
        problem = f"unknown --task {given!r}" if given else "--task is missing"
        raise ValueError(f"command line: {problem}; give --task {', --task '.join(TASKS)}")
    return given


if __name__ == "__main__":
    run_script(main)
