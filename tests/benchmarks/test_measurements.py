"""What is measured is what it says: every benchmark runs at toy size, and ours and the peers have equal shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionModel

from benchmarks import memory, stage2
from benchmarks.attention import attention_races, core_backward
from benchmarks.encoders import count_flops, encoder_races
from benchmarks.first_answer import first_answer_races
from benchmarks.growth import growth_races
from benchmarks.memory import peak_memory, training_step_memory
from benchmarks.mllm import TokenTimes
from benchmarks.models import (
    FILTERS,
    IMAGE_TOKEN,
    STRONG,
    AttentionCore,
    PlainCore,
    RetentionCore,
    clip_config,
    clip_encoder,
    defocus_encoder,
    defocus_mixer,
    defocus_mllm,
    llava,
    mamba_peer,
    question,
    random_heads,
    random_images,
)
from benchmarks.pushes import push_races
from benchmarks.sampling import Stopwatch
from benchmarks.setting import CPU_SIZES, GPU_SIZES, SUITES, Setting
from benchmarks.shows import SHOWS
from benchmarks.suites import BENCHMARKS, benchmarks_of, perform
from defocus_mllm import DefocusVisionModel
from defocus_mllm.mixers_defocus import DefocusAttention, DefocusRetention
from defocus_mllm.stream_defocus import DefocusStream

TOY = Setting.of("cpu", toy=True)
FULL_CPU = Setting.of("cpu", toy=False)
FULL_GPU = Setting("gpu", False, GPU_SIZES, "cuda", torch.bfloat16, FULL_CPU.rules)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls that would have a process of their own stay here; gives their names."""
    calls: list[str] = []

    def call(function: Callable[..., Any], **arguments: Any) -> Any:
        calls.append(f"{function.__name__} {arguments['model']}")
        measured = function(**arguments)
        # the peak of this process has long been reached
        return {**measured, "peak": measured["before"] + 1000 * len(calls)}

    for module in (memory, stage2):
        monkeypatch.setattr(module, "isolated", call)
    return calls


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_runs_at_toy_size(name: str, suite: str, in_this_process: list[str]) -> None:
    races = perform(name, suite=suite, toy=True, repeats=1, seed=0)
    assert races
    for race in races:
        assert "error" not in race
        assert race["dtype"] == {"cpu": "float32", "gpu": "bfloat16"}[suite]
        assert (race["device"], race["threads"]) == ("cpu", torch.get_num_threads())
        assert [contestant for contestant in race["contestants"] if "error" in contestant] == []
        assert race["comparisons"]
        assert all(row["ratio"] > 0 for row in race["comparisons"])
    if name in ("memory", "stage2"):
        assert len(in_this_process) == len(set(in_this_process)) > 2


@pytest.mark.parametrize(("suite", "setting"), [("cpu", FULL_CPU), ("gpu", FULL_GPU)])
def test_every_claim_is_judged_by_the_benchmark_that_names_it(suite: str, setting: Setting) -> None:
    judged = set()
    for benchmark in benchmarks_of(suite):
        shows = {row.show for race in benchmark.races(setting) for row in race.comparisons if row.show}
        assert shows <= set(benchmark.shows)
        if suite == "cpu":
            assert shows == set(benchmark.shows)
        judged |= shows
    if suite == "cpu":
        assert judged == set(SHOWS)


def test_the_shapes_are_those_of_the_claims() -> None:
    assert CPU_SIZES.core == (4, 12, 64)
    assert CPU_SIZES.core_lengths == (197, 577, 1025, 2305)
    assert (min(CPU_SIZES.growth_lengths), max(CPU_SIZES.growth_lengths)) == (1024, 16384)
    assert CPU_SIZES.rows == (2, 100)
    assert FULL_CPU.encoder_config("attention", CPU_SIZES.answer_image).num_patches == 1024
    for mixer in ("attention", "retention", "mamba"):
        assert FULL_CPU.encoder_config(mixer, 224).num_image_tokens == 197
        assert FULL_CPU.encoder_config(mixer, 224).hidden_size == 768
    assert [FULL_GPU.encoder_config("mamba", size).num_image_tokens for size, _ in GPU_SIZES.images] == [577, 2305]
    large = FULL_GPU.encoder_config("attention", 384)
    assert (large.hidden_size, large.num_hidden_layers, large.num_attention_heads) == (1024, 24, 16)


def heads_of(mixer: Any, tokens: torch.Tensor, parts: int = 3) -> tuple[torch.Tensor, ...]:
    return mixer.split_heads(mixer.qkv(tokens), parts)


def test_the_attention_core_is_what_the_mixer_does_between_its_projections() -> None:
    mixer = defocus_mixer(TOY, "attention").double()
    assert isinstance(mixer, DefocusAttention)
    tokens = torch.randn(2, 9, mixer.config.hidden_size, dtype=torch.float64)
    core = AttentionCore(TOY).double()
    core.scaling, core.band_pass = mixer.scaling, mixer.band_pass
    mixed = core(*heads_of(mixer, tokens)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixer.out_proj(mixed), mixer(tokens)[0], rtol=1e-9, atol=1e-12)


def test_the_retention_core_is_what_the_mixer_does_before_its_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = defocus_mixer(TOY, "retention").double()
    assert isinstance(mixer, DefocusRetention)
    tokens = torch.randn(2, 9, mixer.config.hidden_size, dtype=torch.float64)
    core = RetentionCore(TOY).double()
    core.scaling, core.band_pass = mixer.scaling, mixer.band_pass
    before_norm = []
    monkeypatch.setattr(
        "defocus_mllm.mixers_defocus.group_rms_norm", lambda mixed, *_: before_norm.append(mixed) or mixed
    )
    mixer(tokens)
    torch.testing.assert_close(core(*heads_of(mixer, tokens)), before_norm[0], rtol=1e-9, atol=1e-12)


def test_the_plain_core_is_causal_or_not() -> None:
    query, key, value = random_heads(TOY, 1, 5)
    changed = value.clone()
    changed[:, :, -1] += 1
    for causal, same in ((True, True), (False, False)):
        core = PlainCore(causal)
        first, second = core(query, key, value)[:, :, 0], core(query, key, changed)[:, :, 0]
        assert torch.equal(first, second) is same


def test_heads_are_views_of_one_projection() -> None:
    query, key, value = random_heads(TOY, 3, 5)
    assert query.shape == key.shape == value.shape == (3, TOY.sizes.core[1], 5, TOY.sizes.core[2])
    assert query.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    assert not torch.equal(query, key)


def test_filters_decay_as_they_say() -> None:
    decays = {name: AttentionCore(FULL_CPU, bounds).band_pass.decay.detach() for name, bounds in FILTERS.items()}
    initial = DefocusAttention(FULL_CPU.encoder_config("attention", 224)).band_pass.decay
    assert decays["initial filter"].equal(initial)
    assert decays["weakly decaying heads"].abs().max() < 1e-3
    assert decays[STRONG].abs().min() > 0.2
    assert decays[STRONG].abs().max() == pytest.approx(5, rel=0.02)


def test_a_backward_pass_has_all_gradients() -> None:
    core = AttentionCore(TOY)
    gradients = core_backward(core, random_heads(TOY, 1, 5))()
    assert [gradient.shape for gradient in gradients[:3]] == [(1, *TOY.sizes.core[1:2], 5, TOY.sizes.core[2])] * 3
    assert {gradient.shape for gradient in gradients[3:]} == {parameter.shape for parameter in core.parameters()}
    assert len(gradients) == 5
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert len(core_backward(PlainCore(True), random_heads(TOY, 1, 5))()) == 3


def test_peers_have_the_shapes_of_ours() -> None:
    image_size, batch = TOY.sizes.images[0]
    images = random_images(TOY, batch, image_size)
    ours, clip = defocus_encoder(TOY, "attention", image_size), clip_encoder(TOY, image_size)
    assert ours(images).last_hidden_state.shape == clip(images).last_hidden_state.shape
    kinds = torch.nn.Linear | torch.nn.Conv2d
    ours_has, clip_has = (
        sum(module.weight.numel() for module in model.modules() if isinstance(module, kinds)) for model in (ours, clip)
    )
    assert ours_has == clip_has
    mamba = defocus_encoder(TOY, "mamba", image_size)
    peer = mamba_peer(TOY, mamba.config)
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj", "conv1d"):
        mine = getattr(mamba.layers[0].mixer, name)
        assert mine.weight.shape == getattr(peer.layers[0].mixer, name).weight.shape, name
    assert len(mamba.layers) == len(peer.layers)


def test_the_count_of_operations_is_that_of_pytorch_for_the_peer() -> None:
    # The peer on the meta device, where PyTorch counts every product of its attention; nothing is computed.
    image_size, batch = CPU_SIZES.images[0]
    with torch.device("meta"):
        clip = CLIPVisionModel(clip_config(FULL_CPU, image_size))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            clip(torch.empty(batch, 3, image_size, image_size))
        ours = DefocusVisionModel(FULL_CPU.encoder_config("attention", image_size))
    assert count_flops(ours, batch, backward=False) == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert count_flops(ours, batch, backward=True) == 3 * count_flops(ours, batch, backward=False)


def test_only_what_must_not_be_rounded_stays_in_float32() -> None:
    model = defocus_encoder(Setting.of("gpu", toy=True), "attention", 32)
    mixer = model.layers[0].mixer
    assert mixer.band_pass.lambda_hat.dtype == mixer.band_pass.theta.dtype == torch.float32
    assert mixer.qkv.weight.dtype == model.norm.weight.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    assert not model.training


def test_both_multimodal_models_read_the_same_question() -> None:
    image_size = TOY.sizes.mllm_image
    tokens = TOY.encoder_config("attention", image_size).num_image_tokens
    ids = question(TOY, tokens, batch=2)
    assert (ids == IMAGE_TOKEN).sum(dim=1).tolist() == [tokens, tokens]
    assert ids.shape == (2, tokens + TOY.sizes.prompt_tokens)
    images = random_images(TOY, 2, image_size)
    for model in (defocus_mllm(TOY, "attention", image_size), llava(TOY, image_size)):
        assert model(input_ids=ids, pixel_values=images).logits.shape == (*ids.shape, TOY.sizes.text["vocab_size"])
    decoders = [
        sum(parameter.numel() for parameter in model.model.language_model.parameters())
        for model in (defocus_mllm(TOY, "mamba", image_size), llava(TOY, image_size))
    ]
    assert decoders[0] == decoders[1]


def test_token_times_count_from_the_first_token() -> None:
    times = iter([1.0, 10.0, 12.0, 15.0])
    streamer = TokenTimes(Stopwatch(clock=lambda: next(times)))
    for _ in range(4):  # the prompt, and three tokens
        streamer.put(torch.tensor([0]))
    assert streamer.after_first(2) == 5.0
    with pytest.raises(ValueError, match="2 tokens came after the first one, not 3"):
        streamer.after_first(3)


def test_a_step_of_stage_2_trains_the_projector_and_the_decoder_s_lora() -> None:
    model = llava(TOY, TOY.sizes.mllm_image)
    trained = stage2.with_lora(model, 2)
    names = [name for name, parameter in trained.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or "multi_modal_projector" in name for name in names)
    assert not any("vision_tower" in name for name in names)
    assert sum("lora_A" in name for name in names) == 7, "one for each linear layer of the one decoder layer"
    assert any("multi_modal_projector" in name for name in names)


def test_peak_memory_remembers_what_is_gone() -> None:
    before = memory.memory_now("cpu")
    torch.ones(64, 1024, 1024).sum()
    assert peak_memory("cpu") - before > 200e6
    assert memory.memory_now("cpu") - before < 100e6


def test_a_training_step_has_moved_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    original = torch.optim.AdamW.step

    def step(self: Any, *arguments: Any) -> Any:
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        steps.append(sum(gradient is not None for gradient in gradients))
        return original(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    measured = training_step_memory("mamba", **TOY.arguments)
    assert len(steps) == 2
    assert min(steps) > 5
    assert measured["backends"]["scan"]


class Encoded(NamedTuple):
    """One call of an encoder: the window and the rows of its cache before, and the tokens it encoded."""

    window: int | None
    rows: int
    tokens: int


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Encoded]:
    """What every call of an encoder had to do."""
    calls: list[Encoded] = []
    forward = DefocusVisionModel.forward

    def counted(self: DefocusVisionModel, pixel_values: torch.Tensor, **arguments: Any) -> Any:
        cache = arguments.get("past_key_values")
        window, before = (None, 0) if cache is None else (cache.attention_window, cache.num_rows)
        output = forward(self, pixel_values, **arguments)
        calls.append(Encoded(window, before, output.last_hidden_state.shape[1]))
        return output

    monkeypatch.setattr(DefocusVisionModel, "forward", counted)
    return calls


def counting(encoded: list[Encoded]) -> Setting:
    """The toy setting with a clock that shows how many tokens have been encoded."""
    clock = dataclasses.replace(TOY.rules, clock=lambda: float(sum(call.tokens for call in encoded)))
    return dataclasses.replace(TOY, rules=clock)


def test_a_row_is_pushed_after_all_rows_before_it_each_time(encoded: list[Encoded]) -> None:
    races = push_races(counting(encoded))
    assert [race.shapes["window"] for race in races] == [None, None, None, TOY.sizes.attention_window]
    for race in races:
        for row, contestant in zip(TOY.sizes.rows, race.build(), strict=True):
            for _ in range(2):
                encoded.clear()
                assert contestant.sample().value == TOY.sizes.row_tokens
                assert encoded == [Encoded(race.shapes["window"], row - 1, TOY.sizes.row_tokens)]


def test_a_stream_has_only_the_last_row_left_and_the_batch_path_everything(encoded: list[Encoded]) -> None:
    config = TOY.encoder_config("attention", TOY.sizes.answer_image)
    columns = TOY.sizes.answer_image // config.patch_size
    for race in first_answer_races(counting(encoded)):
        stream, batch = race.build()
        for _ in range(2):
            assert stream.sample().value == columns + 1, "the last row of patches, and the class token"
            assert batch.sample().value == config.num_image_tokens


def test_a_stream_that_answers_otherwise_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = DefocusStream.ask
    monkeypatch.setattr(DefocusStream, "ask", lambda *words, **settings: ask(*words, **settings) + 1)
    with pytest.raises(ValueError, match="stream and batch path answer differently"):
        first_answer_races(TOY)[0].build()


def test_races_are_named_once() -> None:
    for races in (attention_races, encoder_races, growth_races, push_races, first_answer_races):
        titles = [race.title for race in races(FULL_CPU)]
        assert len(titles) == len(set(titles))
