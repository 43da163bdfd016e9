"""A checkpoint is whole or absent: what a kill, a full disk and a flipped bit leave behind."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from defocus_mllm.files import DiskFullError, write_text_atomically
from training import checkpointing
from training.checkpointing import (
    CheckpointError,
    find_newest_valid,
    get_random_state,
    load_model_weights,
    load_training_state,
    save_checkpoint,
    save_final,
    set_random_state,
    step_directory,
    verify_checkpoint,
)
from training.files import check_writable, fingerprint, remove_partial_work


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes))


class FailingSavable:
    """Writes something, then fails the way a full disk or a kill does."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def save_pretrained(self, save_directory: str | os.PathLike[str], /) -> None:
        (Path(save_directory) / "half.bin").write_bytes(b"half")
        raise self.error


def state(step: int) -> dict[str, Any]:
    return {"step": step, "random_states": [get_random_state()]}


def test_round_trip(tmp_path: Path) -> None:
    model = tiny_model()
    directory = save_checkpoint(step_directory(tmp_path, 7), [model], state(7))
    assert directory.name == "step-000007"
    verify_checkpoint(directory)
    assert load_training_state(directory)["step"] == 7
    other = tiny_model(seed=1)
    load_model_weights(other, directory)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), RuntimeError("x")]
)
def test_failed_save_loses_nothing_older(tmp_path: Path, error: BaseException) -> None:
    model = tiny_model()
    first = save_checkpoint(step_directory(tmp_path, 1), [model], state(1), save_total_limit=1)
    expected = DiskFullError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        save_checkpoint(step_directory(tmp_path, 2), [model, FailingSavable(error)], state(2), save_total_limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    verify_checkpoint(first)


def test_full_disk_inside_torch_save_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")

    monkeypatch.setattr(checkpointing.torch, "save", full)
    with pytest.raises(DiskFullError, match=r"step-000001.*free some space"):
        save_checkpoint(step_directory(tmp_path, 1), [tiny_model()], state(1))


def test_killed_before_the_rename_leaves_only_a_partial_folder(tmp_path: Path) -> None:
    """The process dies for real, between the last write and the rename."""
    process = os.fork()
    if process == 0:
        os.replace = lambda *_: os._exit(9)  # type: ignore[assignment]
        checkpointing.write_json_atomically = lambda path, value: path.write_text(json.dumps(value))  # type: ignore
        save_checkpoint(step_directory(tmp_path, 1), [FailingSavable(SystemExit())][:0], {"step": 1})
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    assert find_newest_valid(tmp_path) == (None, [])
    assert len(remove_partial_work(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "no manifest", "torn manifest"])
def test_damaged_newest_is_skipped_and_named(tmp_path: Path, damage: str) -> None:
    older = save_checkpoint(step_directory(tmp_path, 1), [tiny_model()], state(1))
    newest = save_checkpoint(step_directory(tmp_path, 2), [tiny_model()], state(2))
    weights, manifest = newest / "model.safetensors", newest / "manifest.json"
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        weights.write_bytes(content[:-1])
    elif damage == "remove":
        weights.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:-9])
    found, warnings = find_newest_valid(tmp_path)
    assert found == older
    assert len(warnings) == 1
    assert "step-000002" in warnings[0]


def test_limit_deletes_the_oldest_after_the_newest_is_there(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save_checkpoint(step_directory(tmp_path, step), [tiny_model()], state(step), save_total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000010"]


def test_limit_never_deletes_what_was_just_saved(tmp_path: Path) -> None:
    save_checkpoint(step_directory(tmp_path, 100), [tiny_model()], state(100))  # of a run taken up again from before
    newest = save_checkpoint(step_directory(tmp_path, 50), [tiny_model()], state(50), save_total_limit=1)
    assert list(tmp_path.iterdir()) == [newest]


def test_state_is_read_without_executing_it(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, ("touch executed",)

    directory = save_checkpoint(step_directory(tmp_path, 1), [tiny_model()], {"step": 1, "evil": Evil()})
    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_training_state(directory)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 2, r"lacks 9 weights, first model\.layers\.1"),
        ("vocab_size", 50, r"do not fit its config\.json"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path: Path, field: str, value: int, message: str) -> None:
    directory = save_checkpoint(step_directory(tmp_path, 1), [tiny_model()], state(1))
    header = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**header, field: value}))
    with pytest.raises(CheckpointError, match=message):
        load_model_weights(tiny_model(), directory)


def test_random_state_round_trip() -> None:
    saved = get_random_state()
    drawn = (random.random(), numpy.random.rand(), torch.rand(3).tolist())
    random.random(), numpy.random.rand(), torch.rand(5)
    set_random_state(saved)
    assert (random.random(), numpy.random.rand(), torch.rand(3).tolist()) == drawn


def test_final_save_keeps_the_folder_on_failure(tmp_path: Path) -> None:
    save_final(tmp_path, [tiny_model()])
    before = fingerprint(tmp_path)
    with pytest.raises(DiskFullError):
        save_final(tmp_path, [tiny_model(1), FailingSavable(OSError(errno.ENOSPC, "No space left on device"))])
    with pytest.raises(DiskFullError):  # as safetensors reports it
        save_final(tmp_path, [tiny_model(1), FailingSavable(RuntimeError("I/O error: No space left on device"))])
    assert fingerprint(tmp_path) == before
    assert not list(tmp_path.glob(".partial*"))


def test_text_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_text_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert [child.name for child in tmp_path.iterdir()] == ["run.json"]


def test_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir .*file/run cannot be written"):
        check_writable(tmp_path / "file" / "run")
