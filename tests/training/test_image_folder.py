"""Image names lead to files inside the image root or nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.conversation_records import BadRecord
from training.image_folder import ImageFolder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("root/coco/0.jpg", "root/coco/1.gif", "root/coco/2.png", "root/coco/2.gif", "outside/secret.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "root/linked").symlink_to(tmp_path / "outside")
    (tmp_path / "root/secret.jpg").symlink_to(tmp_path / "outside/secret.jpg")
    (tmp_path / "root/inner").symlink_to(tmp_path / "root/coco")
    (tmp_path / "root/broken.jpg").symlink_to(tmp_path / "root/gone.jpg")
    (tmp_path / "rootless").mkdir()
    (tmp_path / "rootless/0.jpg").write_bytes(b"x")
    return tmp_path / "root"


def reason(folder: ImageFolder, name: str) -> str:
    with pytest.raises(BadRecord) as caught:
        folder.find(name)
    return caught.value.reason


def test_names_below_the_root_are_found(root: Path) -> None:
    folder = ImageFolder(root)
    for name in ("coco/0.jpg", "./coco//0.jpg", "coco/../coco/0.jpg", str(root / "coco/0.jpg")):
        assert folder.find(name) == (str(root / "coco/0.jpg"), False)
    assert folder.find("inner/0.jpg") == (str(root / "inner/0.jpg"), False)


@pytest.mark.parametrize(
    "name",
    ["../outside/secret.jpg", "coco/../../outside/secret.jpg", "/etc/passwd", "../rootless/0.jpg", "linked/secret.jpg",
     "secret.jpg"],
)  # fmt: skip
def test_none_leaves_it(root: Path, name: str) -> None:
    assert reason(ImageFolder(root), name) == "image outside the image root"


def test_links_out_of_the_root_are_followed_on_demand(root: Path) -> None:
    folder = ImageFolder(root, follow_links=True)
    assert folder.find("linked/secret.jpg") == (str(root / "linked/secret.jpg"), False)
    assert folder.find("secret.jpg") == (str(root / "secret.jpg"), False)
    assert reason(folder, "../outside/secret.jpg") == "image outside the image root"
    with pytest.raises(BadRecord, match="follow_links"):
        ImageFolder(root).find("linked/secret.jpg")


def test_a_root_that_is_a_link_is_the_users_choice(root: Path) -> None:
    (root.parent / "elsewhere").symlink_to(root)
    assert ImageFolder(root.parent / "elsewhere").find("coco/0.jpg")[0].endswith("elsewhere/coco/0.jpg")


@pytest.mark.parametrize("name", ["gone.jpg", "coco", "broken.jpg", "coco/0.jpg/1.jpg", "x" * 5000, "."])
def test_what_is_no_file_is_missing(root: Path, name: str) -> None:
    assert reason(ImageFolder(root, any_extension=True), name) == "image missing"


def test_another_extension_is_taken_on_demand_if_there_is_one(root: Path) -> None:
    assert reason(ImageFolder(root), "coco/1.jpg") == "image missing"
    folder = ImageFolder(root, any_extension=True)
    assert folder.find("coco/1.jpg") == (str(root / "coco/1.gif"), True)
    assert folder.find("coco/0.jpg") == (str(root / "coco/0.jpg"), False)
    assert reason(folder, "coco/2.jpg") == "image missing"  # two have that name
