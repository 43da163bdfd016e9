"""The model card says what the files beside it show, says what is not known, and goes to the Hub with the model."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForImageTextToText

from defocus_mllm import DefocusForImageClassification, DefocusVisionConfig
from defocus_mllm.card_defocus import CARD, MARK, model_card
from defocus_mllm.cli import build_parser
from defocus_mllm.files import combined_sha256

RUN = {
    "stage": "stage2",
    "arguments": {"learning_rate": 0.002, "data": "/secret/place.json", "vision_config": {"preset": "tiny"}},
    "inputs": {"data": "ab12" * 16},
    "step": 40,
    "total_steps": 50,
    "parameters": 1000,
    "trainable_parameters": 10,
    "train_seconds": 3.5,
    "commit": "c0ffee",
    "versions": {"torch": "2.13.0"},
    "hardware": {"cores": 2, "gpu": None},
}


def results_of(folder: Path, partial: bool = False) -> dict:
    """A results.json as `eval.run` writes it, of the weights in `folder`."""
    metrics = {"accuracy": {"value": 0.75, "ci95": [0.7, 0.8125], "method": "wilson", "cluster": "image"}}
    return {
        "schema_version": 1,
        "run_id": "0123456789ab",
        "partial": partial,
        "benchmark": {
            "name": "easy_vqa",
            "split": "test",
            "version": "1.0",
            "n": 5 if partial else 9673,
            "n_expected": 9673,
            "fingerprint": "fe" * 32,
            "reference": "https://example.org/easy",
        },
        "model": {"weights_sha": combined_sha256(sorted(folder.glob("*.safetensors")))},
        "metrics": {} if partial else metrics,
        **({"partial_metrics": metrics} if partial else {}),
        "env": {"git": "c0ffee"},
    }


def run_command(*words: str | Path) -> None:
    arguments = build_parser().parse_args(["card", *map(str, words)])
    arguments.run(arguments)


@pytest.fixture
def checkpoint(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_saved_model_has_a_card_that_invents_nothing(model, checkpoint):
    card = ModelCard.load(checkpoint / CARD)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["defocus-attention", "defocus-vit", "custom_code"],
    }
    stored = sum(parameter.numel() for parameter in model.parameters())
    assert f"| Parameters stored | {stored:,} |" in card.text
    assert "| Tokens of an image | 18 |" in card.text
    for unknown in ("Base models: not stated.", "No record of a training run", "None is recorded", "Not stated."):
        assert unknown in card.text


def test_other_models_have_their_own_task(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
    config = DefocusVisionConfig(mixer="mamba", state_size=2, group_norm_size=16, time_step_rank=2, **sizes)
    classifier = DefocusForImageClassification(config)
    classifier.save_pretrained(tmp_path / "classifier")
    classifier.encoder.save_pretrained(tmp_path / "encoder")
    tasks = {name: ModelCard.load(tmp_path / name / CARD).data for name in ("classifier", "encoder")}
    assert tasks["classifier"].pipeline_tag == "image-classification"
    assert tasks["encoder"].pipeline_tag == "image-feature-extraction"
    assert tasks["encoder"].tags == ["defocus-attention", "defocus-mamba", "custom_code"]


def test_the_command_adds_training_evaluation_and_licence(checkpoint, tmp_path, capsys):
    (checkpoint / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "results.json").write_text(json.dumps(results_of(checkpoint)))
    run_command(
        checkpoint, "--results", tmp_path / "results.json", "--license", "mit", "--base-model", "org/encoder", "org/llm"
    )
    assert "1 evaluation(s), licence mit" in capsys.readouterr().out
    card = ModelCard.load(checkpoint / CARD)
    assert (card.data.license, card.data.base_model) == ("mit", ["org/encoder", "org/llm"])
    (entry,) = card.data.eval_results
    assert (entry.dataset_name, entry.dataset_split, entry.metric_value) == ("easy_vqa", "test", 0.75)
    assert "0.7000 to 0.8125" in entry.metric_name
    assert "| easy_vqa | test | accuracy | 75.00 % | 70.00 to 81.25 | 9,673 of 9,673 |" in card.text
    assert "| Steps | 40 of 50 |" in card.text
    assert f"| `data` | `{RUN['inputs']['data']}` |" in card.text
    assert "| `learning_rate` | 0.002 |" in card.text
    assert "secret" not in card.text
    assert "Wilson".lower() in card.text
    assert "fe" * 32 in card.text


def test_a_checkpoint_inside_a_run_finds_its_record(model, tmp_path):
    folder = tmp_path / "checkpoints" / "step-000007"
    model.save_pretrained(folder)
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    run_command(folder)
    assert "| Steps | 7 of 50 |" in (folder / CARD).read_text()


def test_a_partial_evaluation_is_no_result(checkpoint):
    text = model_card(checkpoint, results=[results_of(checkpoint, partial=True)])
    assert "model-index" not in text
    assert "75.00 % (not a result: partial)" in text
    assert "| 5 of 9,673 |" in text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda results: results["model"].update(weights_sha="another"), "is of other weights"),
        (lambda results: results["model"].clear(), "does not say of which"),
        (lambda results: results.update(schema_version=2), "not a results.json of this version"),
    ],
)
def test_results_of_other_weights_are_refused(checkpoint, tmp_path, spoil, message):
    results = results_of(checkpoint)
    spoil(results)
    (tmp_path / "results.json").write_text(json.dumps(results))
    before = (checkpoint / CARD).read_text()
    with pytest.raises(ValueError, match=message):
        run_command(checkpoint, "--results", tmp_path / "results.json")
    assert (checkpoint / CARD).read_text() == before


def test_a_card_written_by_hand_is_not_replaced(model, checkpoint, caplog):
    (checkpoint / CARD).write_text("# mine\n")
    with pytest.raises(ValueError, match="was not generated"):
        run_command(checkpoint)
    model.save_pretrained(checkpoint)
    assert (checkpoint / CARD).read_text() == "# mine\n"
    assert "does it fit these weights?" in caplog.text


def test_a_malformed_licence_and_an_empty_folder_are_one_line(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="--license: 'MIT License' is no identifier"):
        run_command(checkpoint, "--license", "MIT License")
    with pytest.raises(FileNotFoundError, match="is no checkpoint"):
        run_command(tmp_path)


def test_a_copy_keeps_the_card_and_other_weights_do_not(checkpoint, tmp_path):
    (checkpoint / "run.json").write_text(json.dumps(RUN))
    run_command(checkpoint, "--license", "mit")
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint)
    loaded.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same" / CARD).read_text() == (checkpoint / CARD).read_text()
    with torch.no_grad():
        loaded.lm_head.weight[0, 0] += 1
    loaded.save_pretrained(tmp_path / "changed")
    changed = (tmp_path / "changed" / CARD).read_text()
    assert MARK in changed
    assert "No record of a training run" in changed
    assert "mit" not in ModelCard(changed).data.to_dict().values()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that is a folder: what is uploaded, and the card it holds already."""
    state = SimpleNamespace(uploads=[], card=None)

    def upload_folder(self, *, folder_path, **kwargs):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        state.uploads.append(SimpleNamespace(files=files, **kwargs))
        return "commit"

    def download(self, repo_id, filename, **kwargs):
        (tmp_path / "hub.md").write_text(state.card)
        return str(tmp_path / "hub.md")

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "file_exists", lambda self, *args, **kwargs: state.card is not None)
    monkeypatch.setattr(HfApi, "hf_hub_download", download)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return state


def test_one_commit_takes_weights_code_and_card_to_the_hub(checkpoint, hub):
    run_command(checkpoint, "--license", "mit")
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint)
    loaded.add_model_tags(["trl"])
    assert loaded.push_to_hub("me/model", private=True, tags=["mine"]) == "commit"
    (upload,) = hub.uploads
    assert upload.repo_id == "me/model"
    of_the_processor = {"processing_defocus.py", "image_processing_defocus.py", "chat_defocus.py"}
    code = {path.name for path in checkpoint.glob("*.py")} - of_the_processor
    assert set(upload.files) == {"config.json", "generation_config.json", "model.safetensors", CARD, *code}
    assert {"modeling_defocus.py", "configuration_defocus.py", "card_defocus.py"} <= code
    card = ModelCard(upload.files[CARD].decode())
    assert card.data.license == "mit"
    assert card.data.tags == ["defocus-attention", "defocus-vit", "custom_code", "trl", "mine"]


def test_saving_with_push_to_hub_uploads_the_same(model, hub, tmp_path):
    model.save_pretrained(tmp_path / "copy", push_to_hub=True, repo_id="me/other", commit_message="first")
    (upload,) = hub.uploads
    assert (upload.repo_id, upload.commit_message) == ("me/other", "first")
    assert MARK in upload.files[CARD].decode()


@pytest.mark.parametrize(
    ("card", "replaced"),
    [
        ("# written by hand", False),
        (f"{MARK}\nan older one", True),
        ("This model card has been automatically generated.", True),
    ],
)
def test_a_card_on_the_hub_is_replaced_only_if_no_person_wrote_it(model, hub, card, replaced):
    hub.card = card
    model.push_to_hub("me/model")
    assert (CARD in hub.uploads[0].files) == replaced
