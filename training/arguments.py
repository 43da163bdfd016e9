"""Arguments of the training scripts: one dataclass a stage, a docstring under each field, checked when built.

Values come from a YAML recipe and the command line; see `training.argument_parsing`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from training.augmentation_arguments import AugmentationArguments
from training.chat_arguments import ChatArguments
from training.data_arguments import DataArguments
from training.guard_arguments import GuardArguments
from training.held_out_arguments import HeldOutArguments
from training.json_fields import JsonDict
from training.packing_arguments import PackingArguments
from training.scale_arguments import ScaleArguments
from training.streaming_arguments import StreamingArguments
from training.tracking_arguments import TrackingArguments
from training.tuning_arguments import TuningArguments

COMPONENTS = ("projector", "language_model", "vision_tower")


@dataclass
class CommonArguments(ScaleArguments, GuardArguments, TrackingArguments):
    """What every stage has."""

    output_dir: str = ""
    """Folder of this run: the trained model, checkpoints/, run.json and metrics.jsonl."""
    seed: int = 0
    """Seed of initialisation, order of the data, augmentation and dropout."""
    num_train_epochs: float = 1.0
    """Passes over the training data; a fraction is allowed."""
    max_steps: int = -1
    """If positive: the number of optimizer steps, instead of num_train_epochs."""
    global_batch_size: int = 32
    """Samples an optimizer step learns from, over all processes; the same on one GPU and on eight."""
    per_device_batch_size: int = 0
    """Samples a process takes at once (0: as many as fit the global batch); the rest is accumulated."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    min_learning_rate: float = 0.0
    """Where the cosine ends."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises linearly from 0."""
    warmup_steps: int = 0
    """If positive: the number of these steps, instead of warmup_ratio."""
    weight_decay: float = 0.0
    """AdamW weight decay; vectors, biases and the band-pass filter's parameters never get any."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns it off."""
    adam_beta1: float = 0.9
    """First moment's decay."""
    adam_beta2: float = 0.999
    """Second moment's decay."""
    adam_epsilon: float = 1e-8
    """What AdamW adds to the root of the second moment before dividing by it."""
    ema_decay: float = 0.0
    """If positive: an exponential moving average of the parameters is kept and is what the run ends with."""
    ema_warmup: bool = True
    """Average over fewer steps at first, so that short runs forget their random start; the release does not."""
    logging_steps: int = 10
    """Steps between lines of metrics.jsonl."""
    save_steps: int = 0
    """Steps between checkpoints; 0 saves the model once, at the end."""
    save_total_limit: int = 2
    """Checkpoints kept; 0 keeps all."""
    resume: bool = True
    """Continue from the newest valid checkpoint in output_dir if there is one; false: output_dir must be empty."""
    dataloader_num_workers: int = 0
    """Processes that prepare batches; 0 does it between the steps."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 computes in bfloat16 and keeps the weights in float32."""
    gradient_checkpointing: bool = False
    """Compute activations a second time instead of keeping them: less memory, slower."""
    torch_compile: bool = False
    """Compile the model: the first steps, and the first ones of a new shape, take minutes; all others are faster."""
    cpu: bool = False
    """Stay on the CPU even if there is a GPU."""
    dry_run: bool = False
    """Check everything, do one forward and backward pass, save and load the model, and leave nothing behind."""

    def __post_init__(self) -> None:
        require(bool(self.output_dir), "output_dir: required, the folder of this run")
        self.check_guard()
        self.check_tracking()
        for name in ("num_train_epochs", "learning_rate", "global_batch_size", "logging_steps", "adam_epsilon"):
            require(getattr(self, name) > 0, f"{name}: must be positive, got {getattr(self, name)}")
        for name in ("min_learning_rate", "weight_decay", "max_grad_norm", "save_steps", "save_total_limit", "seed"):
            require(getattr(self, name) >= 0, f"{name}: must not be negative, got {getattr(self, name)}")
        for name in ("warmup_ratio", "adam_beta1", "adam_beta2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, f"{name}: must lie in [0, 1), got {getattr(self, name)}")
        require(self.max_steps == -1 or self.max_steps > 0, f"max_steps: must be -1 or positive, got {self.max_steps}")
        for name in ("dataloader_num_workers", "per_device_batch_size", "warmup_steps"):
            require(getattr(self, name) >= 0, f"{name}: must not be negative, got {getattr(self, name)}")
        require(
            self.min_learning_rate <= self.learning_rate,
            f"min_learning_rate: {self.min_learning_rate:g} is above learning_rate {self.learning_rate:g}",
        )


@dataclass
class Stage0VisionArguments(CommonArguments, AugmentationArguments, StreamingArguments):
    """Stage 0, vision: the encoder learns to classify images (main and auxiliary loss, scheduled drop path)."""

    task: Literal["classification", "contrastive", "language"] = "classification"
    """Which part of stage 0 this is."""
    data: str = ""
    """Labelled images: metadata.jsonl, a Parquet file (or a glob or folder of them), or a folder of class folders."""
    image_column: str = "image"
    """Column of the images in Parquet files or a saved data set."""
    label_column: str = "label"
    """Column of the classes in Parquet files or a saved data set."""
    image_cache_megabytes: int = 1024
    """Memory a process takes to keep the images of a data set decoded, at the encoder's size, 8 bits a value."""
    validation_data: str = ""
    """Labelled images, in any of the forms of `data`, that nothing is learned from; empty: no validation."""
    validation_steps: int = 0
    """Steps between validations; 0 validates once, after the last step."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """What to do with a record that cannot be used: stop before training, or leave it out and report it."""
    check_images: int = 10_000
    """Images decoded before training, evenly spaced (all, if they fit the cache); a corrupt one later stops the run."""
    model: str = ""
    """Folder of an encoder or classifier to start from (another stage 0's output_dir); empty: random weights."""
    vision_config: JsonDict = field(default_factory=JsonDict)
    """Fields of DefocusVisionConfig; "preset" names a preset they override; with `model` they change its own."""
    image_mean: list[float] = field(default_factory=list)
    """Mean of red, green and blue, from 0 to 1, that pixels are normalised with; default 0.5, or those of `model`."""
    image_std: list[float] = field(default_factory=list)
    """Standard deviation that goes with image_mean."""
    decay_class_token: bool = True
    """Weight decay on class token and position embeddings too, as in the release (by accident)."""
    min_drop_path_rate: float = 0.0
    """Drop path rate of the deepest block in the first epoch; the rate grows linearly over the epochs."""
    drop_path_rate: float = 0.0
    """Drop path rate of the deepest block in the last epoch; with the same minimum, in every epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.task == "classification", "task: this is the classification part of stage 0")
        require(bool(self.data), "data: required, a file or folder of labelled images")
        for name in ("image_cache_megabytes", "validation_steps"):
            require(getattr(self, name) >= 0, f"{name}: must not be negative, got {getattr(self, name)}")
        require(
            bool(self.validation_data) or not self.validation_steps,
            "validation_steps: set, but there is no validation_data",
        )
        self.check_augmentation()
        self.check_streaming(self.max_steps, self.repeated_augmentation)
        for name in ("image_mean", "image_std"):
            require(len(getattr(self, name)) in (0, 3), f"{name}: needs three values, red, green and blue")
        require(
            0 <= self.min_drop_path_rate <= self.drop_path_rate < 1,
            "drop_path_rate: 0 <= min_drop_path_rate <= drop_path_rate < 1 is needed, got "
            f"{self.min_drop_path_rate} and {self.drop_path_rate}",
        )


@dataclass
class Stage0ContrastiveArguments(CommonArguments):
    """Stage 0, contrastive: the encoder learns to tell which text belongs to an image (CLIP)."""

    task: Literal["classification", "contrastive", "language"] = "contrastive"
    """Which part of stage 0 this is."""
    data: str = ""
    """Images with a text each: metadata.jsonl, or a Parquet file (or a glob or folder of them)."""
    image_column: str = ""
    """Field of the images; empty: "image" or, where images are files, "file_name"."""
    text_column: str = ""
    """Field of the texts; empty: "text" or "caption"."""
    image_cache_megabytes: int = 1024
    """Memory a process takes to keep the images of a data set decoded, at the encoder's size, 8 bits a value."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """What to do with a record that cannot be used: stop before training, or leave it out and report it."""
    check_images: int = 10_000
    """Images decoded before training, evenly spaced (all, if they fit the cache); a corrupt one later stops the run."""
    vision_config: JsonDict = field(default_factory=JsonDict)
    """Fields of DefocusVisionConfig; "preset" names a preset they override."""
    min_drop_path_rate: float = 0.0
    """Drop path rate of the deepest block in the first epoch; grows linearly from epoch to epoch."""
    drop_path_rate: float = 0.0
    """Drop path rate of the deepest block in the last epoch."""
    text_config: JsonDict = field(default_factory=lambda: JsonDict({"model_type": "clip_text_model"}))
    """Configuration of the text encoder, "clip_text_model" or any decoder-only model: "model_type" and its fields."""
    tokenizer: str = ""
    """Folder of a trained tokenizer; empty: one is trained on the texts."""
    vocab_size: int = 0
    """Size of the vocabulary of a tokenizer trained here."""
    max_length: int = 77
    """Longest text in tokens, its begin and end included; what is beyond is cut off and counted."""
    projection_dim: int = 512
    """Width of the embeddings in which images and texts are compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.task == "contrastive", "task: this is the contrastive part of stage 0")
        require(bool(self.data), "data: required, a file or folder of images with texts")
        require(bool(self.tokenizer) or self.vocab_size > 0, "vocab_size: required unless `tokenizer` names a folder")
        require(
            not (self.tokenizer and self.vocab_size),
            "vocab_size: a tokenizer is given, which has its own vocabulary; leave one of the two out",
        )
        require("model_type" in self.text_config, 'text_config: "model_type" is missing, for example "clip_text_model"')
        require(self.max_length > 2, f"max_length: must be above 2 (begin and end), got {self.max_length}")
        require(self.image_cache_megabytes >= 0, "image_cache_megabytes: must not be negative")
        require(
            0 <= self.min_drop_path_rate <= self.drop_path_rate < 1,
            "drop_path_rate: 0 <= min_drop_path_rate <= drop_path_rate < 1 is needed, got "
            f"{self.min_drop_path_rate} and {self.drop_path_rate}",
        )


@dataclass
class Stage0LanguageArguments(CommonArguments):
    """Stage 0, language: a small language model learns its first words where no pre-trained one is given."""

    task: Literal["classification", "contrastive", "language"] = "language"
    """Which part of stage 0 this is."""
    text: str = ""
    """UTF-8 text, one sample a line; or conversations without images (.json, .jsonl), rendered by the chat template."""
    tokenizer: str = ""
    """Folder of a trained tokenizer; empty: one is trained on `text`."""
    vocab_size: int = 0
    """Size of the vocabulary of a tokenizer trained here."""
    text_config: JsonDict = field(default_factory=JsonDict)
    """Configuration of any decoder-only model of Transformers: "model_type" and its fields."""
    max_length: int = 256
    """Longest sample in tokens; longer lines are an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.task == "language", "task: this is the language part of stage 0")
        require(bool(self.text), "text: required, a text file with one sample a line, or conversations")
        require(bool(self.tokenizer) or self.vocab_size > 0, "vocab_size: required unless `tokenizer` names a folder")
        require(
            not (self.tokenizer and self.vocab_size),
            "vocab_size: a tokenizer is given, which has its own vocabulary; leave one of the two out",
        )
        require("model_type" in self.text_config, 'text_config: "model_type" is missing, for example "llama"')
        require(self.max_length > 1, f"max_length: must be above 1, got {self.max_length}")


@dataclass
class MultimodalArguments(
    CommonArguments, DataArguments, ChatArguments, TuningArguments, PackingArguments, HeldOutArguments
):
    """What stages 1 and 2 share: image conversations, a vision tower, a language model and the projector between."""

    model: str = ""
    """Folder of a De-focus MLLM to continue from (for example stage 1's output_dir)."""
    vision_model: str = ""
    """Folder of a vision encoder (stage 0's output_dir); with language_model, instead of model."""
    language_model: str = ""
    """Folder of a causal language model with its tokenizer; with vision_model, instead of model."""
    projector_type: Literal["mlp2x_gelu", "linear"] = "mlp2x_gelu"
    """What stands between encoder and language model, when they are put together here."""
    image_fit: Literal["", "stretch", "crop", "pad"] = ""
    """How pictures become square: stretched, cut to their middle, or padded; empty: as the model's processor does."""
    train: list[str] = field(default_factory=lambda: ["projector"])
    """What learns, out of projector, language_model and vision_tower; the rest is frozen."""
    max_length: int = 2048
    """Longest conversation in tokens, image tokens included; whole turns are dropped from the end and counted."""
    shuffle_turns: bool = False
    """Put the question-answer pairs about an image in a new random order each epoch."""
    max_turns: int = 0
    """Question-answer pairs of a conversation used at once; 0 uses all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_data(self.max_steps)
        parts = bool(self.vision_model) + bool(self.language_model)
        require(
            parts == 0 if self.model else parts == 2,
            "model: give either model, or both vision_model and language_model",
        )
        for name in self.train:
            require(name in COMPONENTS, f"train: unknown component {name!r}; choose from {', '.join(COMPONENTS)}")
        require(bool(self.train), f"train: nothing to train; choose from {', '.join(COMPONENTS)}")
        self.check_tuning(self.train, self.model)
        require(self.max_length > 1, f"max_length: must be above 1, got {self.max_length}")
        require(self.max_turns >= 0, f"max_turns: must not be negative, got {self.max_turns}")
        self.check_packing(self.streaming)
        self.check_held_out()


@dataclass
class Stage1Arguments(MultimodalArguments):
    """Stage 1, alignment: the projector learns on captions."""


@dataclass
class Stage2Arguments(MultimodalArguments):
    """Stage 2, instruction tuning: projector and language model learn on conversations."""

    train: list[str] = field(default_factory=lambda: ["projector", "language_model"])
    """What learns, out of projector, language_model and vision_tower; the rest is frozen."""


@dataclass
class EvaluationArguments:
    """Section `evaluation` of a recipe: what the pipeline asks of `python -m eval.run`."""

    benchmarks: str = "easy_vqa"
    """Names of benchmarks, separated by commas."""
    batch_size: int = 0
    """Questions answered at once; 0 leaves it to eval.run."""
    limit: int = 0
    """Evaluate only the first questions (no headline number then); 0 evaluates all."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 0, f"batch_size: must not be negative, got {self.batch_size}")
        require(self.limit >= 0, f"limit: must not be negative, got {self.limit}")


@dataclass
class EvidenceArguments:
    """Section `evidence` of a recipe and what `python -m training.evidence` takes; the recipe's `stage0_vision` trains.

    The three mixers have parameters of different kinds, so that equal size needs different widths and depths.
    """

    output_dir: str = ""
    """Folder of all runs, their predictions and the results."""
    train: str = ""
    """Training pictures, any `data` that stage 0 takes."""
    test: str = ""
    """Test pictures, looked at once: after the last epoch of a run."""
    study: Literal["main", "ablation_filter", "ablation_drop_path", "ablation_auxiliary_loss"] = "main"
    """Which table; runs that two tables share are trained once."""
    models: list[str] = field(default_factory=list)
    """Names of the study's models; empty: all of them."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds; every model is trained once with each."""
    processes: int = 1
    """Runs trained side by side, the cores shared among them; 0 only writes the results of finished runs."""
    write: str = ""
    """Markdown page whose generated part is replaced, for example docs/results/cifar10.md."""
    attention: JsonDict = field(default_factory=JsonDict)
    """Fields of DefocusVisionConfig for the models of mixer "attention", above those of `stage0_vision`."""
    retention: JsonDict = field(default_factory=JsonDict)
    """The same for mixer "retention"."""
    mamba: JsonDict = field(default_factory=JsonDict)
    """The same for mixer "mamba"."""
    cpu: bool = False
    """Stay on the CPU even if there is a GPU."""

    def __post_init__(self) -> None:
        for name in ("output_dir", "train", "test"):
            require(bool(getattr(self, name)), f"{name}: required")
        require(bool(self.seeds) and min(self.seeds) >= 0, f"seeds: must not be negative, got {self.seeds}")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds: {self.seeds} names one twice")
        require(self.processes >= 0, f"processes: must not be negative, got {self.processes}")


SECTIONS: dict[str, type] = {
    "stage0_contrastive": Stage0ContrastiveArguments,
    "stage0_language": Stage0LanguageArguments,
    "stage0_vision": Stage0VisionArguments,
    "stage1": Stage1Arguments,
    "stage2": Stage2Arguments,
    "evaluation": EvaluationArguments,
    "evidence": EvidenceArguments,
}
"""Section of a recipe -> the arguments it holds."""


def require(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `condition` holds."""
    if not condition:
        raise ValueError(message)
