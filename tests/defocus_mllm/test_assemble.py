"""Any decoder becomes an MLLM: it speaks as before, reads images, learns, answers; what cannot work is refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from defocus_mllm import DefocusImageProcessor, DefocusVisionConfig, DefocusVisionModel, cli, modeling_defocus
from defocus_mllm.assemble import assemble, load_encoder, load_language

sys.path.insert(0, str(Path(__file__).parent))

from decoders import DECODERS, QUIRKS, ROWS, WORDS, save_decoder, save_tokenizer

NAMES = ("--vision", "--language")
QUESTION = [{"type": "image"}, {"type": "text", "text": "word1 word2 word3"}]


def new(vision: Path | str, language: Path, output: Path, *options: str) -> int:
    """Exit code of `defocus-mllm new`."""
    words = ["new", "--vision", str(vision), "--language", str(language), "--output", str(output), *options]
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    DefocusVisionModel(DefocusVisionConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(folder)
    DefocusImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def parts(encoder: Path, language: Path) -> tuple[Any, Any]:
    """What `assemble` takes, in float32."""
    return (
        load_encoder(str(encoder), NAMES[0], torch.float32),
        load_language(str(language), NAMES[1], torch.float32),
    )


CASES = [(kind, tied) for kind in DECODERS for tied in (False, True)] + [(kind, False) for kind in QUIRKS]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{'tied' if case[1] else 'untied'}")
def assembled(request: pytest.FixtureRequest, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(original language model, MLLM, processor, tied): the last three loaded from what the command wrote."""
    kind, tied = request.param
    folder = tmp_path_factory.mktemp(kind)
    torch.manual_seed(0)
    language = save_decoder(folder / "language", kind, tie_word_embeddings=tied)
    assert new(encoder, language, folder / "new") == 0
    original = AutoModelForCausalLM.from_pretrained(language).eval()
    model = AutoModelForImageTextToText.from_pretrained(folder / "new").eval()
    return original, model, AutoProcessor.from_pretrained(folder / "new"), tied


def question(processor: Any, *texts: str) -> Any:
    image = Image.new("RGB", (20, 20), (200, 30, 30))
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
        for text in texts
    ]
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


@torch.no_grad()
def test_on_words_it_is_the_language_model_it_was(assembled: Any) -> None:
    original, model, _, tied = assembled
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    words = torch.randint(3, len(WORDS), (2, 14))
    for gain in (1, 20):  # enough for every soft cap to be felt
        for layer in (original.get_output_embeddings(), model.lm_head):
            layer.register_forward_hook(lambda module, arguments, output, gain=gain: output * gain)
        actual, expected = model(input_ids=words).logits, original(words).logits
        torch.testing.assert_close(actual[..., : len(WORDS)], expected[..., : len(WORDS)], rtol=1e-5, atol=1e-5)
    for layer in (original.get_output_embeddings(), model.lm_head):
        layer._forward_hooks.clear()


def test_it_learns_from_an_image_and_an_answer(assembled: Any) -> None:
    _, model, processor, _ = assembled
    inputs = question(processor, "word1 word2")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, -100)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert loss.isfinite()
    assert all(gradients[f"model.multi_modal_projector.linear_{layer}.weight"].norm() > 0 for layer in (1, 2))
    assert gradients["model.vision_tower.embeddings.patch_embed.weight"].norm() > 0
    model.zero_grad()


def test_it_answers_with_and_without_a_cache_alone_and_in_a_batch(assembled: Any) -> None:
    _, model, processor, _ = assembled
    texts = ["word1 word2 word3 word4", "word5"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    alone = []
    for text in texts:
        inputs = question(processor, text)
        length = inputs["input_ids"].shape[1]
        answer = model.generate(**inputs, **options)
        assert torch.equal(answer, model.generate(**inputs, **options, use_cache=False))
        alone.append(answer[0, length:].tolist())
    inputs = question(processor, *texts)
    together = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert together.tolist() == alone


def test_a_quirk_that_nobody_knows_is_refused(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_defocus, "finish_logits", lambda logits, text_config: logits)
    small = {"initializer_range": 0.02, "final_logit_softcapping": 500.0}  # changes logits by less than 1e-6
    language = save_decoder(tmp_path / "gemma2", "gemma2", **small)
    with pytest.raises(ValueError, match="--language: 'gemma2' does something to its logits that De-focus MLLM does"):
        assemble(*parts(encoder, language), "linear", NAMES)


def test_embeddings_that_only_the_decoder_scales_are_noticed(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_defocus, "scale_embeddings", lambda inputs_embeds, text_config: inputs_embeds)
    language = save_decoder(tmp_path / "falcon_h1", "falcon_h1")
    with pytest.raises(ValueError, match="'falcon_h1' does something to its logits"):
        assemble(*parts(encoder, language), "linear", NAMES)


@pytest.mark.parametrize("rows", [len(WORDS), ROWS, ROWS + 30])
@pytest.mark.parametrize("kind", ["gemma2", "phi"])
def test_new_tokens_are_near_the_mean_and_differ(kind: str, rows: int, encoder: Path, tmp_path: Path) -> None:
    language = save_decoder(tmp_path / kind, kind, vocab_size=rows)
    original = AutoModelForCausalLM.from_pretrained(language)
    assembly = assemble(*parts(encoder, language), "linear", NAMES)
    model, tokenizer = assembly.model, assembly.processor.tokenizer
    assert model.config.text_config.vocab_size == max(rows, len(tokenizer)) == len(model.lm_head.weight)
    assert any("grows from 40 to 45 rows" in note for note in assembly.notes) == (rows == len(WORDS))
    assert any(f"30 of {rows} rows" in note and "padding" in note for note in assembly.notes) == (rows == ROWS + 30)
    new_rows = range(len(WORDS), len(tokenizer))
    assert set(tokenizer.convert_tokens_to_ids(["<image>", "<|user|>", "<|assistant|>", "<|system|>", "<pad>"])) == set(
        new_rows
    )
    for layer, before in (
        (model.get_input_embeddings(), original.get_input_embeddings()),
        (model.lm_head, original.get_output_embeddings()),
    ):
        known, added = before.weight[: len(WORDS)], layer.weight[len(WORDS) : len(tokenizer)]
        assert torch.equal(layer.weight[: len(WORDS)], known)
        distances = (added - known.mean(dim=0)) / known.std(dim=0)
        assert 0.05 < distances.std() < 0.15
        assert len(added.bfloat16().unique(dim=0)) == len(added)
    if kind == "phi":
        torch.testing.assert_close(model.lm_head.bias[new_rows[0]], original.lm_head.bias[: len(WORDS)].mean())


def test_a_model_in_16_bits_stays_in_16_bits(encoder: Path, tmp_path: Path) -> None:
    language = save_decoder(tmp_path / "llama", "llama", dtype=torch.bfloat16)
    for vision in (encoder, "defocus_vit_tiny"):
        output = tmp_path / Path(vision).name
        assert new(vision, language, output) == 0
        model = AutoModelForImageTextToText.from_pretrained(output, dtype="auto")
        types = {parameter.dtype for name, parameter in model.named_parameters() if "band_pass" not in name}
        assert types == {torch.bfloat16}
        assert model.model.vision_tower.layers[0].mixer.band_pass.theta.dtype == torch.float32


def test_the_command_tells_what_it_made_of_what(encoder: Path, tmp_path: Path, capsys: Any) -> None:
    language = save_decoder(tmp_path / "qwen3", "qwen3")
    tokenizer_config = json.loads((language / "tokenizer_config.json").read_text())
    tokenizer_config["chat_template"] = "{{ messages[0]['content'] }}"
    (language / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    output = tmp_path / "new"
    assert new(encoder, language, output, "--projector", "linear") == 0
    table, notes = capsys.readouterr()
    model = AutoModelForImageTextToText.from_pretrained(output)
    counts = {line.split("  ")[0]: line.split()[-1] for line in table.splitlines()[1:-1]}
    for part, module in {
        "encoder": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "decoder": model.model.language_model,
        "output layer": model.lm_head,
        "together": model,
    }.items():
        assert counts[part] == f"{sum(parameter.numel() for parameter in module.parameters()):,}"
    assert "linear, 16 to 32" in table
    assert "the chat template of --language is replaced by the one of De-focus MLLM" in notes
    assert "added to the tokenizer of --language: <image>, <|user|>, <|assistant|>, <|system|>, <pad>" in notes
    processor = AutoProcessor.from_pretrained(output)
    rendered = processor.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    assert rendered == "<|user|><image>\nword1 word2 word3</s><|assistant|>"
    assert processor.tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert new(encoder, language, output) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_preset_gives_an_encoder_with_random_weights(tmp_path: Path, capsys: Any) -> None:
    language = save_decoder(tmp_path / "llama", "llama")
    assert new("defocus_mamba_tiny", language, tmp_path / "new") == 0
    assert "defocus_mamba_tiny is a preset, its weights are random" in capsys.readouterr().err
    config = AutoModelForImageTextToText.from_pretrained(tmp_path / "new").config.vision_config
    assert config.mixer == "mamba"
    processor = AutoProcessor.from_pretrained(tmp_path / "new")
    assert processor.image_processor.size["height"] == config.image_size
    assert processor.num_image_tokens == config.num_image_tokens


# --- what cannot work: one line, exit code 2, nothing written ---------------------------------------------------------


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused_language(folder: Path, kind: str) -> Path:
    """A folder that cannot become the language side, for the reason that `kind` names."""
    if kind in ("t5", "vit", "llava", "mamba", "gpt2-short"):
        tiny = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": ROWS}
        if kind == "gpt2-short":
            return save_decoder(folder, "gpt2", max_position_embeddings=5)
        if kind == "mamba":
            AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **tiny)).save_pretrained(folder)
        elif kind == "llava":
            AutoConfig.for_model(kind).save_pretrained(folder)
        else:
            small = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16} if kind == "t5" else {}
            AutoModel.from_config(AutoConfig.for_model(kind, **(tiny | small))).save_pretrained(folder)
        save_tokenizer(folder)
        return folder
    save_decoder(folder, "llama")
    if kind == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif kind == "no end":
        save_tokenizer(folder, eos_token=None)
    elif kind == "broken tokenizer":
        (folder / "tokenizer.json").write_text("{")
    elif kind == "broken config":
        (folder / "config.json").write_text("[1")
    elif kind == "own code":
        rewrite(folder / "config.json", model_type="telepath")
    elif kind == "mrope":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        rewrite(folder / "config.json", rope_parameters=rope)
    else:
        shutil.rmtree(folder)
    return folder


REFUSALS = {
    "t5": "is an encoder-decoder ('t5'); a decoder-only model is needed",
    "vit": "is a 'vit', which is no causal language model",
    "llava": "is multimodal already ('llava'); take a language model alone",
    "mamba": "'mamba' cannot go on from a cache, so it cannot answer",
    "gpt2-short": "an image has 5 tokens, but --language reads no more than 5",
    "no tokenizer": "has no tokenizer; save the model's tokenizer in the same folder",
    "no end": "has no eos_token, which ends every turn",
    "broken tokenizer": "cannot be loaded",
    "broken config": "config.json is no configuration",
    "own code": "is a 'telepath', which the installed Transformers does not have; a model that brings its own code",
    "mrope": "has positions in three dimensions (mrope_section)",
    "absent": "holds no saved model (no config.json in it)",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_language_model_that_cannot_work_is_refused_in_one_line(
    kind: str, encoder: Path, tmp_path: Path, capsys: Any
) -> None:
    language = refused_language(tmp_path / "language", kind)
    capsys.readouterr()
    assert new(encoder, language, tmp_path / "new") == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("[transformers]"))
    assert re.match("error: --(language|vision): ", line)
    assert REFUSALS[kind] in line
    assert not (tmp_path / "new").exists()


def test_a_decoder_that_looks_ahead_is_refused(encoder: Path, tmp_path: Path) -> None:
    language = save_decoder(tmp_path / "gemma3_text", "gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="'gemma3_text' is not causal as it is configured"):
        assemble(*parts(encoder, language), "linear", NAMES)


@pytest.mark.parametrize("kind", ["absent", "language", "pixels", "no image processor"])
def test_an_encoder_that_cannot_work_is_refused_in_one_line(
    kind: str, encoder: Path, tmp_path: Path, capsys: Any
) -> None:
    language = save_decoder(tmp_path / "llama", "llama")
    vision = tmp_path / "vision"
    if kind != "absent":
        shutil.copytree(language if kind == "language" else encoder, vision)
    if kind == "pixels":
        rewrite(vision / "preprocessor_config.json", size={"height": 24, "width": 24})
    elif kind == "no image processor":
        (vision / "preprocessor_config.json").unlink()
    message = {
        "absent": "is neither a folder nor a preset; presets are defocus_vit_tiny",
        "language": "holds a 'llama', not a De-focus encoder",
        "pixels": "the image processor makes 24 x 24 pixels, but the encoder takes 16 x 16",
        "no image processor": "has no preprocessor_config.json",
    }[kind]
    assert new(vision, language, tmp_path / "new") == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert line.startswith("error: --vision: ")
    assert message in line
    assert not (tmp_path / "new").exists()
