"""`eval.run --list`: complete, in step with the loaders, and true about what is on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.listing import describe_data, list_benchmarks
from eval.registry import benchmark_names, get_benchmark
from eval.run import main
from tests.eval.benchmarks.hub_rows import COMMIT, write_snapshot


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "hf"


def make(folder: Path, names: tuple[str, ...]) -> None:
    """Files of these names, with nothing that a loader could read, and folders where there is no suffix."""
    for name in names:
        path = folder / name.replace("*", "1")
        if path.suffix:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{")
        else:
            path.mkdir(parents=True, exist_ok=True)


def test_every_benchmark_is_described(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["--list", "--data-root", str(tmp_path)])
    *blocks, total = capsys.readouterr().out.strip().split("\n\n")
    assert [block.split(":")[0] for block in blocks] == benchmark_names()
    assert total == f"0 of {len(blocks)} benchmarks have their data under {tmp_path} or in a cache: none"
    for block in blocks:
        benchmark = get_benchmark(block.split(":")[0])
        text = " ".join(block.split())
        assert f"{benchmark.n_expected:,} samples" in text
        assert " ".join(benchmark.data_needed.split()) in text
        assert benchmark.reference in text
        assert f"now missing: {tmp_path}/" in text
        assert all(repository in text for source in benchmark.hub for repository in source.repositories)
        assert ("not scored here" in text) == (not benchmark.metrics)
        assert benchmark.submission is None or f"writes {benchmark.submission.file_name}" in text
        assert all(len(line) <= 120 or len(line.split()) <= 2 for line in block.split("\n")), (
            "only a path may be longer"
        )


def test_servers_and_judges_are_named() -> None:
    listing = " ".join(list_benchmarks(None).split())
    assert "vqav2_test_dev: test-dev2015, 107,394 samples, not scored here: test server required writes" in listing
    assert "vqav2_test_dev_submission.json for what scores it" in listing


@pytest.mark.parametrize(
    ("name", "number"), [(name, at) for name in benchmark_names() for at in range(len(get_benchmark(name).layouts))]
)
def test_layouts_name_all_that_is_read(name: str, number: int, tmp_path: Path) -> None:
    benchmark = get_benchmark(name)
    layout = benchmark.layouts[number]
    make(tmp_path / benchmark.folder, layout.files)
    try:
        benchmark.load(tmp_path)
    except FileNotFoundError as error:
        pytest.fail(f"the loader misses what the layout does not name: {error}")
    except ValueError:
        pass  # it found the files and began to read them
    assert describe_data(benchmark, tmp_path)[1].startswith(("found: official", "questions found in"))


def test_a_missing_file_is_looked_for_beside_those_that_are_there(tmp_path: Path) -> None:
    benchmark = get_benchmark("ai2d")
    for folder in (tmp_path / "ai2d", tmp_path):
        make(folder, ("questions",))
        assert describe_data(benchmark, tmp_path)[1].startswith(f"missing: {folder}/ai2d_test_ids.csv")
        with pytest.raises(FileNotFoundError, match=f"^{folder}/ai2d_test_ids.csv: no such file: --data-root DIR with"):
            benchmark.load(tmp_path)
        (folder / "questions").rmdir()


def test_what_is_here_is_found(caches: Path, tmp_path: Path) -> None:
    textvqa, root = get_benchmark("textvqa"), tmp_path / "data"
    assert describe_data(textvqa, root) == (
        False,
        f"missing: {root}/textvqa/TextVQA_0.5.1_val.json; no dataset in a cache either",
    )
    snapshot = caches / "hub" / "datasets--lmms-lab--textvqa" / "snapshots" / COMMIT
    write_snapshot(snapshot, "textvqa")
    for place in (None, root):
        ready, status = describe_data(textvqa, place)
        assert (ready, status) == (True, f"found: dataset lmms-lab/textvqa@{COMMIT[:12]} in {snapshot}")
    make(root / "textvqa", textvqa.layouts[0].files)
    ready, status = describe_data(textvqa, root)
    assert not ready
    assert status == f"questions found in {root}/textvqa, images missing: {root}/textvqa/train_images/*.jpg"
    make(root / "textvqa", ("train_images/*.jpg",))
    assert describe_data(textvqa, root) == (True, f"found: official files in {root}/textvqa")
    assert "2 of" not in list_benchmarks(None)
    assert list_benchmarks(root).split("\n")[-1].endswith("in a cache: textvqa, textvqa_ocr")


def test_missing_data_are_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    make(tmp_path / "pope", get_benchmark("pope").layouts[0].files)
    command = ["--model", str(tmp_path / "no model"), "--output", str(tmp_path), "--data-root", str(tmp_path)]
    images = f"pope: questions found in {tmp_path}/pope, images missing: {tmp_path}/pope/val2014/COCO_val2014_*.jpg"
    with pytest.raises(FileNotFoundError) as both:
        main([*command, "--benchmarks", "pope, gqa"])
    assert f"{images}; gqa: missing: {tmp_path}/gqa/testdev_balanced_questions.json" in str(both.value)
    with pytest.raises(FileNotFoundError) as one:
        main([*command, "--benchmarks", "pope"])
    assert str(one.value).endswith(f"needed: {get_benchmark('pope').data_needed}")
    make(tmp_path / "pope", get_benchmark("pope").layouts[0].images)
    with pytest.raises(FileNotFoundError, match=r"--model: .*no model holds no saved model"):
        main([*command, "--benchmarks", "pope"])


def test_a_data_root_that_is_no_folder_is_said_to_be_none(tmp_path: Path) -> None:
    for command in (["--list"], ["--model", "m", "--benchmarks", "pope", "--output", "o"]):
        with pytest.raises(FileNotFoundError, match=r"^--data-root: .*/nowhere is no folder$"):
            main([*command, "--data-root", str(tmp_path / "nowhere")])


def test_many_splits_of_a_dataset_are_counted() -> None:
    assert str(get_benchmark("mmmu").hub[0]) == "MMMU/MMMU (Accounting/validation, ... 30 in all, Sociology/validation)"


def test_a_partial_dataset_is_said_to_be_one(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "gqa", "gqa")
    (tmp_path / "gqa" / "testdev_balanced_images" / "testdev-00000-of-00002.parquet").unlink()
    ready, status = describe_data(get_benchmark("gqa"), tmp_path)
    assert not ready
    assert "the dataset is incomplete" in status
    assert "file 0 of 2" in status
