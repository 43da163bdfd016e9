"""Datasets of the Hub as a second source: same samples as the official files, from every layout on disk, offline."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from datasets.packaged_modules.parquet.parquet import Parquet

from eval.hub import load_from_hub
from eval.registry import Benchmark, benchmark_names, get_benchmark
from eval.report import main as report
from eval.run import evaluate
from eval.samples import BenchmarkData
from eval.score import score_file
from tests.eval.benchmarks.hub_rows import COMMIT, OFFICIAL, ROWS, picture, table, write_snapshot
from tests.eval.fake_generator import FakeGenerator


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, and no network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def refuse(*_: object) -> None:
        raise AssertionError("no connection may be opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    datasets.disable_progress_bars()
    return tmp_path / "hf"


def hub_folder(caches: Path, repository: str) -> Path:
    """The snapshot of a repository in the Hub's cache."""
    folder = caches / "hub" / f"datasets--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return folder / "snapshots" / COMMIT


def in_hub_cache(name: str, caches: Path, data_root: Path) -> None:
    write_snapshot(hub_folder(caches, get_benchmark(name).hub[0].repositories[0]), name)


def in_hub_cache_by_readme(name: str, caches: Path, data_root: Path) -> None:
    write_snapshot(hub_folder(caches, get_benchmark(name).hub[0].repositories[0]), name, readme=True)


def in_datasets_cache(name: str, caches: Path, data_root: Path) -> None:
    """Written by `datasets` itself."""
    repository = get_benchmark(name).hub[0].repositories[0]
    folder = f"{repository.split('/')[0]}___{datasets.naming.camelcase_to_snakecase(repository.split('/')[1])}"
    for number, ((config, split), rows) in enumerate(ROWS[name].items()):
        file = data_root.parent / f"{number}.parquet"
        table(rows).to_parquet(file)
        Parquet(
            cache_dir=str(caches / "datasets"),
            dataset_name=folder,
            hash=COMMIT,
            config_name=config or "default",
            data_files={split: [str(file)]},
        ).download_and_prepare()


def saved(name: str, caches: Path, data_root: Path) -> None:
    for (config, split), rows in ROWS[name].items():
        folder = data_root / name / config if config else data_root / name
        datasets.DatasetDict({split: table(rows)}).save_to_disk(folder)


def snapshot_in_data_root(name: str, caches: Path, data_root: Path) -> None:
    write_snapshot(data_root / name, name)


LAYOUTS = [in_hub_cache, in_hub_cache_by_readme, in_datasets_cache, saved, snapshot_in_data_root]


def official(name: str, data_root: Path) -> BenchmarkData:
    """The same questions from official files."""
    for file, content in OFFICIAL[name].items():
        path = data_root / get_benchmark(name).folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content) + "\n")
    return get_benchmark(name).load(data_root)


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_samples_are_those_of_the_official_files(name: str, caches: Path, tmp_path: Path) -> None:
    in_hub_cache(name, caches, tmp_path / "data")
    data = get_benchmark(name).load_anywhere(None)
    expected = official(name, tmp_path / "official")
    assert data.samples == expected.samples
    assert data.fingerprint() == expected.fingerprint()
    assert str(data.origin) == f"datasets cache {get_benchmark(name).hub[0].repositories[0]}@{COMMIT[:12]}"


def test_every_benchmark_with_a_dataset_is_tested() -> None:
    assert {name for name in benchmark_names() if get_benchmark(name).hub} == set(ROWS)
    numbered_by_row = {"ai2d", "ai2d_no_mask", "chartqa", "infovqa", "infovqa_test", "scienceqa"}
    assert set(ROWS) - set(OFFICIAL) == numbered_by_row | {"mmmu"}  # whose official files are those of the Hub


def test_scienceqa_is_numbered_by_row(caches: Path, tmp_path: Path) -> None:
    in_hub_cache("scienceqa", caches, tmp_path)
    text, image = get_benchmark("scienceqa").load_anywhere(None).samples
    assert (text.id, text.images, text.question, text.target) == ("row-0", (), "Q?", "B")
    assert (image.images, image.question) == (("images/test/row-1/image.png",), "Context: Look.\nR?")


def test_chartqa_has_its_parts_in_order(caches: Path) -> None:
    in_hub_cache("chartqa", caches, Path())
    data = get_benchmark("chartqa").load_anywhere(None)
    assert len(data.samples) == 1251
    assert [(data.samples[at].id, data.samples[at].target) for at in (0, 1249, 1250)] == [
        ("human_0", "5"),
        ("human_1249", "5"),
        ("augmented_0", "6"),
    ]
    data.provide_images(data.samples[1250].images)
    assert (data.image_root / "test/png/row-1250.png").read_bytes() == picture(2)["bytes"]
    misplaced = ROWS["chartqa"][None, "test"][1250]
    with pytest.raises(ValueError, match=r"row 1: 'type' must be human_test in this row, found 'augmented_test'"):
        get_benchmark("chartqa").hub[0].sample(misplaced, 0, "row 1")


@pytest.mark.parametrize("name", ["ai2d", "ai2d_no_mask"])
def test_masked_and_unmasked_diagrams_are_two_datasets(name: str, caches: Path) -> None:
    in_hub_cache(name, caches, Path())
    data = get_benchmark(name).load_anywhere(None)
    (sample,) = data.samples
    assert (sample.target, sample.choices) == ("C", ("a", "b", "c", "d"))
    other = {"ai2d": "ai2d_no_mask", "ai2d_no_mask": "ai2d"}[name]
    with pytest.raises(FileNotFoundError, match="nor is there a dataset"):
        get_benchmark(other).load_anywhere(None)


@pytest.mark.parametrize("split", ["", "_test"])
def test_infovqa_tells_images_apart_by_their_address(split: str, caches: Path) -> None:
    in_hub_cache(f"infovqa{split}", caches, Path())
    (sample,) = get_benchmark(f"infovqa{split}").load_anywhere(None).samples
    assert (sample.id, sample.cluster) == ("98313", "https://example.org/a.jpg")
    assert sample.answers == (() if split else ("5", "five"))
    assert sample.categories.get("operation") == (None if split else ("counting",))


def test_mmmu_of_the_hub_is_the_official_one(caches: Path, tmp_path: Path) -> None:
    in_hub_cache("mmmu", caches, tmp_path)
    cached = get_benchmark("mmmu").load_anywhere(None)
    write_snapshot(tmp_path / "mmmu", "mmmu")
    official_tables = get_benchmark("mmmu").load(tmp_path)
    assert cached.samples == official_tables.samples
    assert (official_tables.origin, cached.origin is None) == (None, False)
    second = cached.samples[1]
    assert second.images == ("validation_Agriculture_1/image_1.png", "validation_Agriculture_1/image_3.png")
    cached.provide_images(second.images)
    assert (cached.image_root / second.images[1]).read_bytes() == picture(101)["bytes"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gqa", "seed_bench", "scienceqa"])
def test_layouts(name: str, layout: Callable[[str, Path, Path], None], caches: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    layout(name, caches, tmp_path / "data")
    data = get_benchmark(name).load_anywhere(tmp_path / "data")
    assert data.origin is not None
    in_cache = layout in (in_hub_cache, in_hub_cache_by_readme, in_datasets_cache)
    assert data.origin.revision == (COMMIT if in_cache else None)
    shown = [sample for sample in data.samples if sample.images]
    assert len(shown) == 1
    data.provide_images(shown[0].images)
    (written,) = [path for path in data.image_root.rglob("*") if path.is_file()]
    assert written.read_bytes() == picture({"gqa": 50, "seed_bench": 5, "scienceqa": 4}[name])["bytes"]


@pytest.fixture
def textvqa(caches: Path) -> Benchmark:
    """TextVQA of one question, in the Hub's cache."""
    in_hub_cache("textvqa", caches, Path())
    return dataclasses.replace(get_benchmark("textvqa"), n_expected=1)


def test_a_run_takes_the_dataset_and_says_so(textvqa: Benchmark, tmp_path: Path) -> None:
    generator = FakeGenerator()
    printed = evaluate(textvqa, generator, tmp_path / "out", tmp_path / "nothing_here")
    assert f"  data: datasets cache lmms-lab/textvqa@{COMMIT[:12]}\n" in printed
    assert "no official fingerprint confirms them" in printed
    ((request,),) = generator.batches
    assert request.images[0].read_bytes() == picture(8)["bytes"]
    described = json.loads((tmp_path / "out" / "textvqa" / "results.json").read_text())["benchmark"]
    assert described["origin"]["repository"] == "lmms-lab/textvqa"
    assert described["origin"]["revision"] == COMMIT
    assert described["fingerprint_checked"] is False
    report(["--evaluation", str(tmp_path / "out" / "textvqa"), "--output", str(tmp_path / "report.html")])
    shutil.rmtree(described["image_root"])
    report(["--evaluation", str(tmp_path / "out" / "textvqa"), "--output", str(tmp_path / "again.html")])
    assert (tmp_path / "again.html").read_text() == (tmp_path / "report.html").read_text()


def test_submission_of_test_dev_covers_the_whole_test_split(caches: Path, tmp_path: Path) -> None:
    in_hub_cache("vqav2_test_dev", caches, Path())
    benchmark = dataclasses.replace(get_benchmark("vqav2_test_dev"), n_expected=1)
    generator = FakeGenerator()
    evaluate(benchmark, generator, tmp_path)
    ((request,),) = generator.batches
    path = tmp_path / "vqav2_test_dev" / "vqav2_test_dev_submission.json"
    answer = generator.answer(request).text
    assert json.loads(path.read_text()) == [
        {"question_id": 7001, "answer": ""},
        {"question_id": 7002, "answer": answer},
    ]


def test_the_branch_main_comes_before_other_revisions(textvqa: Benchmark, caches: Path) -> None:
    snapshots = caches / "hub" / "datasets--lmms-lab--textvqa" / "snapshots"
    write_snapshot(snapshots / ("f" * 40), "textvqa")
    assert textvqa.load_anywhere(None).root == snapshots / COMMIT
    shutil.rmtree(snapshots / COMMIT / "data")
    assert textvqa.load_anywhere(None).root == snapshots / ("f" * 40)


def test_the_newest_of_prepared_revisions_is_taken(caches: Path, tmp_path: Path) -> None:
    in_datasets_cache("textvqa", caches, tmp_path / "data")
    (folder,) = caches.glob(f"datasets/*/*/*/{COMMIT}")
    for revision, age in (("f" * 40, 60), ("0" * 40, -60)):
        shutil.copytree(folder, folder.with_name(revision))
        os.utime(folder.with_name(revision), times=(folder.stat().st_atime, folder.stat().st_mtime + age))
    origin = get_benchmark("textvqa").load_anywhere(None).origin
    assert origin is not None
    assert origin.revision == "f" * 40


def test_official_files_come_first(textvqa: Benchmark, tmp_path: Path) -> None:
    official("textvqa", tmp_path / "official")
    assert textvqa.load_anywhere(tmp_path / "official").origin is None


def test_an_answer_file_is_scored_against_the_dataset(
    textvqa: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.score.get_benchmark", lambda name: textvqa)
    (tmp_path / "answers.jsonl").write_text('{"id": "8", "text": "stop"}\n')
    assert "vqa_accuracy 100.00" in score_file("textvqa", tmp_path / "answers.jsonl", tmp_path / "scored")


def test_another_edition_has_its_own_number(caches: Path) -> None:
    in_hub_cache("pope", caches, Path())
    pope = get_benchmark("pope")
    with pytest.raises(ValueError, match=r"3 samples \(expected 8910\)"):
        pope.load_verified(None)
    edition = dataclasses.replace(pope, hub=(dataclasses.replace(pope.hub[0], counts=(3,)),))
    data = edition.load_verified(None)
    assert edition.number_expected(data) == 3
    assert data.origin is not None
    assert data.origin.differs.startswith("a later edition")


def test_what_is_missing_is_named(caches: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"DIR/gqa/.*lmms-lab/GQA or .*testdev_balanced_images/testdev"):
        get_benchmark("gqa").load_verified(tmp_path)
    write_snapshot(tmp_path / "gqa", "gqa")
    (tmp_path / "gqa" / "testdev_balanced_images" / "testdev-00001-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"testdev_balanced_images: file 1 of 2 \(from 0\) is missing"):
        get_benchmark("gqa").load_verified(tmp_path)
    in_hub_cache("gqa", caches, tmp_path)
    assert get_benchmark("gqa").load_anywhere(tmp_path).root.is_relative_to(caches)


def test_a_damaged_file_and_a_foreign_table_are_named(tmp_path: Path) -> None:
    write_snapshot(tmp_path, "textvqa")
    pope = get_benchmark("pope").hub[0]
    with pytest.raises(ValueError, match=r"validation, row 1: expected the field 'image_source'"):
        load_from_hub("pope", [dataclasses.replace(pope, splits=((None, "validation"),))], tmp_path)
    (tmp_path / "data" / "validation-00000-of-00001.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ValueError, match=r"validation-00000-of-00001.parquet: damaged"):
        get_benchmark("textvqa").load_anywhere(tmp_path)


def test_two_questions_of_one_identifier_are_refused(tmp_path: Path) -> None:
    (row,) = ROWS["textvqa"][None, "validation"]
    (tmp_path / "data").mkdir()
    table([row, row]).to_parquet(tmp_path / "data" / "validation.parquet")
    assert len(get_benchmark("textvqa").load_anywhere(tmp_path).samples) == 1, "the same question, twice"
    table([row, row | {"question": "Another?"}]).to_parquet(tmp_path / "data" / "validation.parquet")
    with pytest.raises(ValueError, match="validation, row 2: another question has the identifier '8' too"):
        get_benchmark("textvqa").load_anywhere(tmp_path)


def test_a_link_of_the_cache_without_its_file_is_named(textvqa: Benchmark, caches: Path) -> None:
    (file,) = (caches / "hub").rglob("validation-*.parquet")
    file.unlink()
    file.symlink_to("gone")
    with pytest.raises(FileNotFoundError, match=r"validation-00000-of-00001\.parquet: no such file: download it again"):
        textvqa.load_anywhere(None)


def test_a_readme_leads_to_no_other_folder(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "other", "textvqa")
    (tmp_path / "textvqa").mkdir()
    for pattern in ("../other/data/*", f"{tmp_path}/other/data/*"):
        header = f"configs: [{{config_name: default, data_files: [{{split: validation, path: '{pattern}'}}]}}]"
        (tmp_path / "textvqa" / "README.md").write_text(f"---\n{header}\n---\n")
        with pytest.raises(FileNotFoundError, match="nor is there a dataset"):
            get_benchmark("textvqa").load_anywhere(tmp_path)


def test_an_image_that_is_only_named_is_not_taken(tmp_path: Path) -> None:
    rows = [row | {"image": {"bytes": None, "path": "/etc/hostname"}} for row in ROWS["textvqa"][None, "validation"]]
    kind = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    (tmp_path / "data").mkdir()
    image = datasets.Dataset.from_list([{"image": row["image"]} for row in rows], features=kind)
    data = datasets.concatenate_datasets([table(rows).remove_columns("image"), image], axis=1)
    data.to_parquet(tmp_path / "data" / "validation.parquet")
    loaded = get_benchmark("textvqa").load_anywhere(tmp_path)
    with pytest.raises(ValueError, match="row 1: names the image '/etc/hostname', but does not hold it"):
        loaded.provide_images(loaded.samples[0].images)
