"""Stage 1, alignment: the projector learns to turn image tokens into words, on captions; the rest is frozen.

    accelerate launch training/stage1.py --config training/recipes/easy_vqa.yaml \
        --vision_model outputs/stage0_vision --language_model outputs/stage0_language \
        --data data/easy_vqa/captions.json --image_root data/easy_vqa/images --output_dir outputs/stage1

Also as `python -m training.stage1`. `--language_model` takes any causal language model saved with its tokenizer.
The result loads with `AutoModelForImageTextToText` and `AutoProcessor`.
"""

from __future__ import annotations

from collections.abc import Sequence

from defocus_mllm.console import run_script
from training.argument_parsing import parse_arguments
from training.arguments import Stage1Arguments
from training.multimodal import build_multimodal
from training.stage import Stage
from training.stages import run_stage


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage from its command line."""
    run_stage("stage1", parse_arguments(Stage1Arguments, "stage1", argv), build)


def build(arguments: Stage1Arguments) -> Stage:
    """Model, conversations and loss."""
    return build_multimodal("stage1", arguments)


if __name__ == "__main__":
    run_script(main)
