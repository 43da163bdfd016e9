"""Micro-batches of labelled pictures for stage 0: augmented one by one, then mixed with one another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from training.augmentation import Augmentation, erase
from training.augmentation_arguments import AugmentationArguments
from training.labelled_images import LabelledImageDataset, collate_labelled_images
from training.mixing import Mixing
from training.sampling import SampleKey, mix_seed

# What a seed is for, so that the choices about a picture and about a batch are unrelated.
_PICTURE, _MIXTURE = 2, 3


class AugmentedBatches:
    """Sample keys -> `pixel_values` (batch, 3, height, width) and `labels`; what `Stage.load_batch` asks for.

    All random choices follow from the seed and the keys, so neither workers nor resuming change them. Labels are those
    of the data set, or (batch, num_labels) probabilities where they are smoothed or mixed.

    Args:
        dataset: the pictures.
        usable: position of each sample in `dataset`.
        arguments: what to do with them.
        seed: the run's.

    Raises:
        ValueError: labels are to be mixed or smoothed, but pictures have attributes instead of one class.
    """

    def __init__(
        self, dataset: LabelledImageDataset, usable: Sequence[int], arguments: AugmentationArguments, seed: int
    ) -> None:
        self.dataset, self.usable, self.seed = dataset, usable, seed
        self.random_erasing = arguments.random_erasing
        self.augmentation = Augmentation(arguments.horizontal_flip, arguments.vertical_flip, arguments.max_shift)
        self.mixing = _mixing(arguments, dataset)

    def __call__(self, keys: Sequence[SampleKey]) -> dict[str, torch.Tensor]:
        """One micro-batch. Raises what the data set raises, naming file and record."""
        batch = collate_labelled_images([self.dataset[self.usable[key.sample]] for key in keys])
        generators = [torch.Generator().manual_seed(key.seed(self.seed, _PICTURE)) for key in keys]
        pictures = [
            erase(self.augmentation(picture, generator), self.random_erasing, generator)
            for picture, generator in zip(batch["pixel_values"], generators, strict=True)
        ]
        pixel_values, labels = torch.stack(pictures), batch["labels"]
        if self.mixing:
            seed = mix_seed(self.seed, _MIXTURE, *(number for key in keys for number in key))
            pixel_values, labels = self.mixing(pixel_values, labels, seed)
        return {"pixel_values": pixel_values, "labels": labels}

    def count_known(self, batch: dict[str, torch.Tensor]) -> int:
        """Number of labels that the loss is a mean of: pictures of known class, or known attributes."""
        known = batch["labels"] >= 0
        return int((known.all(dim=-1) if self.mixing else known).sum())


def _mixing(arguments: AugmentationArguments, dataset: LabelledImageDataset) -> Mixing | None:
    wanted = [name for name in ("mixup", "cutmix", "label_smoothing") if getattr(arguments, name)]
    if not wanted:
        return None
    if dataset.problem_type != "single_label_classification":
        raise ValueError(
            f"{wanted[0]}: needs one class an image; {dataset.report['file']} has attributes (`labels`), so set it to 0"
        )
    return Mixing(
        len(dataset.label_names),
        arguments.mixup,
        arguments.cutmix,
        arguments.mixing_probability,
        arguments.cutmix_probability,
        arguments.label_smoothing,
    )
