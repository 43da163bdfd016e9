"""Mixed pictures and their labels belong together; the draws follow the seed and the probabilities."""

from __future__ import annotations

import pytest
import torch

from training.mixing import Mixing, soft_labels

BATCH, LABELS = 6, 10
CLASSES = torch.arange(BATCH)


def pictures(size: int = 16) -> torch.Tensor:
    """Picture number i has the value i everywhere, so that a mixture says what it is made of."""
    return torch.arange(BATCH, dtype=torch.float32)[:, None, None, None].expand(BATCH, 3, size, size).clone()


def test_smoothing_alone() -> None:
    pixels = pictures()
    mixed, labels = Mixing(4, label_smoothing=0.1)(pixels, torch.tensor([0, 3, 1, 2, 0, 0]), seed=0)
    assert torch.equal(mixed, pixels)
    assert labels[1].tolist() == pytest.approx([0.025, 0.025, 0.025, 0.925])
    assert torch.allclose(labels.sum(1), torch.ones(BATCH))


@pytest.mark.parametrize("seed", range(20))
def test_mixup_mixes_each_picture_and_its_label_with_the_partners(seed: int) -> None:
    mixed, labels = Mixing(LABELS, mixup=0.8)(pictures(), CLASSES, seed)
    kept = labels[0, 0]
    assert 0 <= kept <= 1
    for number in range(BATCH):
        partner = BATCH - 1 - number
        assert torch.allclose(mixed[number], kept * number + (1 - kept) * partner, atol=1e-5)
        assert labels[number, number].item() == pytest.approx(kept.item())
        assert labels[number, partner].item() == pytest.approx(1 - kept.item(), abs=1e-6)
        assert labels[number].sum().item() == pytest.approx(1)


@pytest.mark.parametrize("seed", range(40))
def test_cutmix_pastes_one_rectangle_and_counts_its_pixels(seed: int) -> None:
    mixed, labels = Mixing(LABELS, cutmix=1.0)(pictures(), CLASSES, seed)
    for number in range(BATCH):
        partner = BATCH - 1 - number
        pasted = mixed[number, 0] == partner
        assert ((mixed[number] == number) | pasted).all()
        assert (mixed[number] == mixed[number, :1]).all()
        rows, columns = pasted.any(1), pasted.any(0)
        assert int(pasted.sum()) == int(rows.sum() * columns.sum())
        assert labels[number, partner].item() == pytest.approx(pasted.float().mean().item(), abs=1e-6)
        assert labels[number].sum().item() == pytest.approx(1)


def test_cutmix_covers_all_areas_and_places() -> None:
    covered, areas = torch.zeros(16, 16), []
    for seed in range(400):
        mixed, labels = Mixing(LABELS, cutmix=1.0)(pictures(), CLASSES, seed)
        covered += mixed[0, 0] == BATCH - 1
        areas.append(1 - labels[0, 0].item())
    assert covered.min() > 40  # the corners
    assert covered.max() < 250  # the middle
    assert min(areas) < 0.02
    assert max(areas) > 0.75
    # half the pixels asked for, on average, less what the border cuts off
    assert 0.25 < sum(areas) / len(areas) < 0.4


def kind(mixed: torch.Tensor) -> str:
    if torch.equal(mixed, pictures()):
        return "neither"
    return "cutmix" if mixed[0].unique().numel() == 2 or mixed[0].unique().item() == BATCH - 1 else "mixup"


def test_how_often_each_happens() -> None:
    mixing = Mixing(LABELS, mixup=0.8, cutmix=1.0, mixing_probability=0.5, cutmix_probability=0.25)
    kinds = [kind(mixing(pictures(), CLASSES, seed)[0]) for seed in range(1200)]
    assert 530 < kinds.count("neither") < 700  # a very small rectangle is none
    assert 400 < kinds.count("mixup") < 500
    assert 100 < kinds.count("cutmix") < 180
    only_mixup = Mixing(LABELS, mixup=0.8, cutmix=1.0, cutmix_probability=0.0)
    assert {kind(only_mixup(pictures(), CLASSES, seed)[0]) for seed in range(100)} <= {"mixup", "neither"}


def test_beta_distribution_of_mixup() -> None:
    shares = torch.tensor([Mixing(LABELS, mixup=0.8)(pictures(1), CLASSES, seed)[1][0, 0] for seed in range(1500)])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)


def test_the_seed_decides_and_the_input_stays() -> None:
    pixels, mixing = pictures(), Mixing(LABELS, mixup=0.8, cutmix=1.0)
    before = pixels.clone()
    first = [mixing(pixels, CLASSES, seed) for seed in range(10)]
    torch.manual_seed(3)
    assert all(torch.equal(one[0], mixing(pixels, CLASSES, seed)[0]) for seed, one in enumerate(first))
    assert len({one[0].sum(dim=(1, 2, 3))[0].item() for one in first}) == 10
    assert torch.equal(pixels, before)


def test_what_is_mixed_with_an_unknown_label_is_unknown() -> None:
    labels = torch.tensor([3, -1, 2, 0, 1, 1])
    soft = Mixing(4, mixup=0.8, label_smoothing=0.1)(pictures(), labels, 0)[1]
    assert (soft[[1, 4]] == -1).all()
    assert (soft[[0, 2, 3, 5]] >= 0).all()
    alone = Mixing(4, mixup=0.8, mixing_probability=0.0)(pictures(), labels, 0)[1]
    assert (alone < 0).any(1).tolist() == [False, True, False, False, False, False]
    assert soft_labels(labels, 4, 0.0)[0].tolist() == [0, 0, 0, 1]


def test_one_picture_cannot_be_mixed() -> None:
    with pytest.raises(ValueError, match="per_device_batch_size"):
        Mixing(LABELS, mixup=0.8)(pictures()[:1], CLASSES[:1], 0)
    assert Mixing(LABELS, label_smoothing=0.1)(pictures()[:1], CLASSES[:1], 0)[1].shape == (1, LABELS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mixup", -0.1),
        ("cutmix", -1.0),
        ("mixing_probability", 1.5),
        ("cutmix_probability", -0.5),
        ("label_smoothing", 1.0),
    ],
)
def test_values_out_of_range_name_the_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Mixing(LABELS, **{field: value})
