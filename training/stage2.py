"""Stage 2, instruction tuning: projector and language model learn to answer, on conversations about images.

    accelerate launch training/stage2.py --config training/recipes/easy_vqa.yaml --model outputs/stage1 \
        --data data/easy_vqa/conversations.json --image_root data/easy_vqa/images --output_dir outputs/stage2

Also as `python -m training.stage2`. `--train projector language_model vision_tower` trains the encoder too. Own data:
`--data` takes LLaVA's format (JSON or JSON Lines) and `--image_root` the folder its image paths start from.
The result loads with `AutoModelForImageTextToText` and `AutoProcessor`.
"""

from __future__ import annotations

from collections.abc import Sequence

from defocus_mllm.console import run_script
from training.argument_parsing import parse_arguments
from training.arguments import Stage2Arguments
from training.multimodal import build_multimodal
from training.stage import Stage
from training.stages import run_stage


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage from its command line."""
    run_stage("stage2", parse_arguments(Stage2Arguments, "stage2", argv), build)


def build(arguments: Stage2Arguments) -> Stage:
    """Model, conversations and loss."""
    return build_multimodal("stage2", arguments)


if __name__ == "__main__":
    run_script(main)
