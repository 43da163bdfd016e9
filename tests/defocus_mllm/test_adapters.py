"""LoRA: trained, saved, loaded by the Auto classes, merged; nothing that was trained is lost without an error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from defocus_mllm import DefocusConfig, DefocusForConditionalGeneration, DefocusVisionConfig
from defocus_mllm.adapters import NOT_QUANTISED, add_lora, load_adapter, lora_config, save_adapter
from defocus_mllm.loading import CheckpointError, load_strictly

sys.path.insert(0, str(Path(__file__).parent))

from decoders import DECODERS, save_decoder

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture
def base(model, processor, tmp_path: Path) -> Path:
    for part in (variant(model), processor):
        part.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def inputs(processor, image) -> dict[str, torch.Tensor]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "is it red?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    batch = dict(processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt"))
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["input_ids"] == processor.image_token_id, -100)}


def trained(model: PeftModel, inputs: dict[str, torch.Tensor], steps: int = 2) -> PeftModel:
    """`model` after some steps; LoRA's second factor starts at zero, so the first step moves it alone."""
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**inputs).logits


def variant(model, mixer: str = "attention", **text: Any) -> DefocusForConditionalGeneration:
    """`model` with another mixer or decoder; new weights, narrow enough that logits are not large."""
    vision = {"image_size": 32, "patch_size": 8, "num_registers": 1, "mixer": mixer, **SIZES}
    if mixer == "mamba":
        vision |= {"time_step_rank": 4, "group_norm_size": 16, "aux_loss": "none"}
    config = model.config
    bias = text.pop("lm_head_bias", False)
    return DefocusForConditionalGeneration(
        DefocusConfig(
            vision_config=DefocusVisionConfig(**vision),
            text_config={**config.text_config.to_dict(), "initializer_range": 0.1, **text},
            image_token_id=config.image_token_id,
            lm_head_bias=bias,
        )
    ).eval()


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_comes_back_and_merges(tied, model, processor, inputs, tmp_path) -> None:
    for part in (variant(model, tie_word_embeddings=tied), processor):
        part.save_pretrained(tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    before = logits(base, inputs)
    adapted = trained(add_lora(base, processor, vision=True), inputs)
    after = logits(adapted, inputs)
    assert (after - before).abs().max() > 0.1, "nothing was learned, so nothing is shown"
    save_adapter(adapted, tmp_path / "adapter")

    by_auto_class = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")
    assert type(by_auto_class) is DefocusForConditionalGeneration
    torch.testing.assert_close(logits(by_auto_class, inputs), after, atol=1e-5, rtol=0)
    loaded = load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, inputs), after, atol=1e-5, rtol=0)
    merged = loaded.merge_and_unload()
    assert type(merged) is DefocusForConditionalGeneration
    torch.testing.assert_close(logits(merged, inputs), after, atol=1e-5, rtol=0)
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == tied
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again, inputs), after, atol=1e-5, rtol=0)


def test_projector_and_new_embeddings_are_in_the_checkpoint(base, processor, inputs, tmp_path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(base)
    adapted = trained(add_lora(model, processor), inputs)
    save_adapter(adapted, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model."
    for layer in ("linear_1", "linear_2"):
        name = f"{prefix}model.multi_modal_projector.{layer}.weight"
        original = model.get_submodule(f"model.multi_modal_projector.original_module.{layer}").weight
        assert not torch.equal(saved[name], original), f"{name} was not trained"
    tokens = sorted(("<|system|>", "<|user|>", "<|assistant|>"), key=processor.tokenizer.convert_tokens_to_ids)
    ids = processor.tokenizer.convert_tokens_to_ids(tokens)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    embedding = "model.language_model.embed_tokens"
    assert config["trainable_token_indices"] == {embedding: ids}
    rows = saved[f"{prefix}{embedding}.token_adapter.trainable_tokens_delta"]
    changed = (rows != model.get_submodule(embedding).original_module.weight[ids]).any(dim=1)
    # The chat has no system message.
    learned = {token for token, has_changed in zip(tokens, changed.tolist(), strict=True) if has_changed}
    assert learned == {"<|user|>", "<|assistant|>"}
    assert not any("vision_tower" in name for name in saved)


@pytest.mark.parametrize("mixer", ["attention", "retention", "mamba"])
def test_every_adapted_layer_of_the_encoder_learns(mixer, model, processor, inputs) -> None:
    changed = variant(model, mixer)
    adapted = add_lora(changed, processor, vision=True)
    adapted(**inputs).loss.backward()
    second = {name: weight for name, weight in adapted.named_parameters() if "lora_B" in name}
    assert any("vision_tower" in name for name in second)
    assert any("language_model" in name for name in second)
    assert [name for name, weight in second.items() if weight.grad is None or not weight.grad.any()] == []
    linear = sum(isinstance(module, torch.nn.Linear) for module in variant(model, mixer).model.vision_tower.modules())
    assert sum("vision_tower" in name for name in second) == linear


def test_only_what_is_adapted_or_saved_is_trained(model, processor) -> None:
    adapted = add_lora(model, processor, r=2)
    trained_names = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    kinds = ("language_model", "multi_modal_projector.modules_to_save", "embed_tokens.token_adapter")
    assert all(any(kind in name for kind in kinds) for name in trained_names)
    assert {weight.shape[0] for name, weight in adapted.named_parameters() if "lora_A" in name} == {2}


def test_a_bias_of_the_output_layer_survives(model, processor, inputs, tmp_path) -> None:
    biased = variant(model, lm_head_bias=True)
    torch.nn.init.normal_(biased.lm_head.bias)
    biased.save_pretrained(tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    before = logits(base, inputs)
    adapted = add_lora(base, processor)
    torch.testing.assert_close(logits(adapted, inputs), before)
    after = logits(trained(adapted, inputs), inputs)
    save_adapter(adapted, tmp_path / "adapter")
    merged = load_adapter(tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), after, atol=1e-5, rtol=0)
    tied = variant(model, lm_head_bias=True, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="tied to the embedding and has a bias"):
        lora_config(tied, processor)


def test_a_decoder_without_linear_layers_is_refused(model, processor) -> None:
    gpt2 = {"model_type": "gpt2", "vocab_size": model.config.text_config.vocab_size, "n_embd": 32, "n_layer": 1}
    config = DefocusConfig(
        vision_config=model.config.vision_config,
        text_config={**gpt2, "n_head": 2},
        image_token_id=model.config.image_token_id,
    )
    with pytest.raises(ValueError, match=r"model\.language_model has no linear layers"):
        lora_config(DefocusForConditionalGeneration(config), processor)


@pytest.mark.parametrize("part", ["multi_modal_projector", "lora_A", "trainable_tokens_delta"])
def test_an_adapter_that_lost_weights_is_refused(part, base, processor, inputs, tmp_path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(base)
    folder = tmp_path / "adapter"
    save_adapter(add_lora(model, processor), folder)
    weights = load_file(folder / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if part not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=rf"lacks {len(weights) - len(kept)} weights, first \S*{part}"):
        load_adapter(folder)
    with pytest.raises(ValueError, match=rf"lacks weights \({len(weights) - len(kept)}, first \S*"):
        AutoModelForImageTextToText.from_pretrained(folder)


def test_unknown_weights_and_missing_files_are_refused(base, processor, tmp_path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(base)
    folder = tmp_path / "adapter"
    save_adapter(add_lora(model, processor), folder)
    with pytest.raises(FileNotFoundError, match="holds an adapter without its model"):
        load_strictly(DefocusForConditionalGeneration, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    stray = {"base_model.model.model.language_model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(16, 32)}
    save_file(weights | stray, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 weights in \S* fit nothing, first \S*layers\.9"):
        load_adapter(folder)
    with pytest.raises(ValueError, match=r"has unknown weights \(1, first \S*layers\.9"):
        AutoModelForImageTextToText.from_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        load_adapter(folder)
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        load_adapter(base)


def test_what_could_not_be_loaded_again_is_not_saved(model, base, processor, tmp_path) -> None:
    loaded = AutoModelForImageTextToText.from_pretrained(base)
    own = get_peft_model(loaded, LoraConfig(target_modules=r".*language_model.*q_proj"))
    own.base_model.model.model.multi_modal_projector.requires_grad_(True)
    with pytest.raises(ValueError, match=r"4 trained weights would not be saved, first \S*multi_modal_projector"):
        save_adapter(own, tmp_path / "adapter")
    with pytest.raises(ValueError, match="never saved"):
        save_adapter(add_lora(model, processor), tmp_path / "adapter")
    grown = AutoModelForImageTextToText.from_pretrained(base)
    grown.resize_token_embeddings(333)
    with pytest.raises(ValueError, match="has 333 rows"):
        save_adapter(add_lora(grown, processor), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_four_bits_reach_the_decoder_alone(mixer, model) -> None:
    changed = variant(model, mixer)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=NOT_QUANTISED)
    kept = HfQuantizer.get_modules_to_not_convert(changed, config.llm_int8_skip_modules, changed._keep_in_fp32_modules)
    linear = [name for name, module in changed.named_modules() if isinstance(module, torch.nn.Linear)]
    converted = {name for name in linear if should_convert_module(name, kept)}
    assert converted == {name for name in linear if name.startswith("model.language_model.")}


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_prepared_for_quantised_weights_reaches_every_adapter(reentrant, model, processor, inputs) -> None:
    """As PEFT prepares a 4-bit model; the weights are 32 bits wide, which changes nothing in what is prepared."""
    model.is_loaded_in_4bit = True
    prepared = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert prepared.is_gradient_checkpointing
    adapted = add_lora(prepared, processor, vision=True).train()
    adapted(**inputs).loss.backward()
    second = {name: weight for name, weight in adapted.named_parameters() if "lora_B" in name}
    assert [name for name, weight in second.items() if weight.grad is None or not weight.grad.any()] == []
    projector = [weight for name, weight in adapted.named_parameters() if "projector.modules_to_save" in name]
    assert all(weight.grad.any() for weight in projector)


WITHOUT_PACKAGE = """
import sys
import torch
from transformers import AutoModelForImageTextToText

sys.modules["defocus_mllm"] = None  # importing the package fails
*folders, inputs, output = sys.argv[1:]
logits = []
for folder in folders:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    with torch.no_grad():
        logits.append(model(**torch.load(inputs)).logits)
torch.save(logits, output)
"""


def test_adapter_and_merged_model_load_without_the_package(base, processor, inputs, tmp_path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(base)
    adapted = trained(add_lora(model, processor), inputs)
    after = logits(adapted, inputs)
    save_adapter(adapted, tmp_path / "adapter")
    load_adapter(tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "modeling_defocus.py").is_file()
    torch.save(inputs, tmp_path / "inputs.pt")
    names = ("adapter", "merged", "inputs.pt", "logits.pt")
    finished = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_PACKAGE, *(str(tmp_path / name) for name in names)],
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    for remote in torch.load(tmp_path / "logits.pt"):
        torch.testing.assert_close(remote, after, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", DECODERS)
def test_every_adapted_layer_of_every_decoder_learns(kind, model, processor, inputs, tmp_path) -> None:
    folder = save_decoder(tmp_path / kind, kind, vocab_size=model.config.text_config.vocab_size)
    config = DefocusConfig(
        vision_config=model.config.vision_config,
        text_config=AutoConfig.from_pretrained(folder),
        image_token_id=model.config.image_token_id,
    )
    whole = DefocusForConditionalGeneration(config)
    adapted = add_lora(whole, processor)
    adapted(**inputs).loss.backward()
    second = {name: weight for name, weight in adapted.named_parameters() if "lora_B" in name}
    assert [name for name, weight in second.items() if weight.grad is None or not weight.grad.any()] == []
    linear = [name for name, module in whole.model.language_model.named_modules() if type(module) is torch.nn.Linear]
    adapted_layers = {name.partition("language_model.")[2].partition(".lora_B")[0] for name in second}
    left_out = {name.removesuffix(".base_layer") for name in linear if "lora_" not in name} - adapted_layers
    # The kernels of the hybrid read this layer's weight, to which the adapter adds nothing.
    assert {name.rpartition(".")[2] for name in left_out} == ({"out_proj"} if kind == "falcon_h1" else set())
