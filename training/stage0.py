"""Stage 0: the encoder learns to see, and a small language model learns its first words.

    accelerate launch training/stage0.py --task language --config training/recipes/easy_vqa.yaml \\
        --text data/easy_vqa/dialogues.json --output_dir outputs/stage0_language
    accelerate launch training/stage0.py --task classification --config training/recipes/easy_vqa.yaml \\
        --data data/easy_vqa/images/train/metadata.jsonl --output_dir outputs/stage0_vision

Also as `python -m training.stage0`. `--task` chooses the half and with it the recipe's section, `stage0_language` or
`stage0_vision`. Where a pre-trained language model is given to stages 1 and 2, the language half is not needed.
The result loads with `AutoModelForCausalLM` + `AutoTokenizer`, or with `AutoModelForImageClassification` and
`DefocusVisionModel` + `AutoImageProcessor`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from defocus_mllm.console import run_script
from training.argument_parsing import parse_arguments
from training.arguments import Stage0LanguageArguments, Stage0VisionArguments
from training.language import build_language
from training.stages import run_stage
from training.vision import build_vision


def main(argv: Sequence[str] | None = None) -> None:
    """Run the half that `--task` names."""
    words = list(sys.argv[1:] if argv is None else argv)
    if chosen_task(words) == "language":
        arguments = parse_arguments(Stage0LanguageArguments, "stage0_language", words)
        run_stage("stage0_language", arguments, build_language)
    else:
        run_stage("stage0_vision", parse_arguments(Stage0VisionArguments, "stage0_vision", words), build_vision)


def chosen_task(argv: Sequence[str]) -> str:
    """Value of `--task` in `argv`. Raises `ValueError` when it is absent."""
    for position, word in enumerate(argv):
        if word == "--task" and position + 1 < len(argv):
            return argv[position + 1]
        if word.startswith("--task="):
            return word.partition("=")[2]
    if "-h" in argv or "--help" in argv:
        return "classification"
    raise ValueError("command line: --task is missing; give --task classification or --task language")


if __name__ == "__main__":
    run_script(main)
