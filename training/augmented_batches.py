"""Micro-batches of labelled pictures for stage 0: augmented one by one, then mixed with one another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from training.augmentation import Augmentation, erase, random_crop, to_pixels
from training.augmentation_arguments import AugmentationArguments
from training.labelled_images import LabelledImageDataset
from training.mixing import Mixing
from training.rand_augment import RandAugment
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
        self.crop_min_area, self.random_erasing = arguments.crop_min_area, arguments.random_erasing
        self.augmentation = _augmentation(arguments, dataset)
        self.mixing = _mixing(arguments, dataset)

    def __call__(self, keys: Sequence[SampleKey]) -> dict[str, torch.Tensor]:
        """One micro-batch. Raises what the data set raises, naming file and record."""
        return self.made_of(self.dataset, [self.usable[key.sample] for key in keys], keys)

    def made_of(
        self, dataset: LabelledImageDataset, indices: Sequence[int], keys: Sequence[SampleKey]
    ) -> dict[str, torch.Tensor]:
        """One micro-batch of these pictures of `dataset`, with the random choices of `keys`."""
        generators = [torch.Generator().manual_seed(key.seed(self.seed, _PICTURE)) for key in keys]
        pictures = [
            self._picture(dataset, index, generator) for index, generator in zip(indices, generators, strict=True)
        ]
        pixel_values = dataset.loader.normalise(torch.stack(pictures))
        if self.random_erasing:
            erased = zip(pixel_values, generators, strict=True)
            pixel_values = torch.stack([erase(pixels, self.random_erasing, generator) for pixels, generator in erased])
        labels = dataset.labels[list(indices)]
        if self.mixing:
            seed = mix_seed(self.seed, _MIXTURE, *(number for key in keys for number in key))
            pixel_values, labels = self.mixing(pixel_values, labels, seed)
        return {"pixel_values": pixel_values, "labels": labels}

    def _picture(self, dataset: LabelledImageDataset, index: int, generator: torch.Generator) -> torch.Tensor:
        """(3, height, width) uint8 of the encoder's size, augmented."""
        if self.crop_min_area:
            size, _ = dataset.loader.size
            picture = to_pixels(random_crop(dataset.image(index), size, self.crop_min_area, generator))
        else:
            picture = dataset.pixels(index)
        return self.augmentation(picture, generator)

    def count_known(self, batch: dict[str, torch.Tensor]) -> int:
        """Number of labels that the loss is a mean of: pictures of known class, or known attributes."""
        known = batch["labels"] >= 0
        return int((known.all(dim=-1) if self.mixing else known).sum())


def _augmentation(arguments: AugmentationArguments, dataset: LabelledImageDataset) -> Augmentation:
    rand_augment = None
    if arguments.rand_augment:
        red, green, blue = (round(255 * mean) for mean in dataset.loader.image_processor.image_mean)
        rand_augment = RandAugment(arguments.rand_augment, arguments.rand_augment_std, (red, green, blue))
    return Augmentation(
        arguments.horizontal_flip, arguments.vertical_flip, arguments.max_shift, arguments.color_jitter, rand_augment
    )


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
