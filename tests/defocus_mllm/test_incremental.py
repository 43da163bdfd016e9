"""The encoder in pieces: rows, sections and frames give what the whole gives, and a cache is a value of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defocus_mllm import DefocusForImageClassification, DefocusVisionCache, DefocusVisionConfig, DefocusVisionModel

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
MAMBA = {"state_size": 4, "time_step_rank": 3, "group_norm_size": 16}
MIXERS = ("attention", "retention", "mamba")
PATCH = 4


def build(seed=0, **fields):
    torch.manual_seed(seed)
    config = DefocusVisionConfig(**{"image_size": 6 * PATCH, "patch_size": PATCH, **SIZES, **MAMBA, **fields})
    model = DefocusVisionModel(config).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("broadcast.scale"):
            torch.nn.init.normal_(parameter)  # it starts at 0, where there is nothing to carry
    return model


def cut(pixels, heights, section=1, tiles=()):
    """Pieces of `heights` rows of sections; a row of one section whose index is in `tiles` comes section by section."""
    unit, row, pieces = PATCH * section, 0, []
    for index, height in enumerate(heights):
        rows = pixels[:, :, row * unit : (row + height) * unit]
        pieces += rows.split(unit, dim=3) if index in tiles and height == 1 else [rows]
        row += height
    return pieces


@st.composite
def cuts(draw, rows):
    """Heights that add up to `rows`, and which of the pieces to cut once more."""
    heights = []
    while sum(heights) < rows:
        heights.append(draw(st.integers(1, rows - sum(heights))))
    return heights, draw(st.sets(st.integers(0, len(heights) - 1)))


def encode_pieces(model, pieces, cache=None, **kwargs):
    cache = DefocusVisionCache() if cache is None else cache
    outputs = [model(piece, past_key_values=cache, **kwargs) for piece in pieces]
    assert all(output.pooler_output is None for output in outputs[:-1])
    return torch.cat([output.last_hidden_state for output in outputs], dim=1), outputs[-1].pooler_output, cache


def assert_same(one, other, tolerance=1e-9):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


CONFIGURATIONS = st.fixed_dictionaries(
    {
        "mixer": st.sampled_from(MIXERS),
        "num_registers": st.sampled_from([0, 2]),
        "class_token": st.booleans(),
        "use_absolute_position_embeddings": st.booleans(),
        "section": st.sampled_from([1, 2, 3]),
        "context_broadcasting": st.sampled_from(["none", "mean", "scaled"]),
    }
)


def fields_of(configuration):
    fields = dict(configuration)
    section = fields.pop("section")
    if section > 1:
        fields.update(patch_order="sections", section_size=section)
    if fields["mixer"] == "mamba":
        fields["context_broadcasting"] = "none"
    return {**fields, "aux_loss": "none"}, section


@settings(max_examples=40, deadline=None)
@given(configuration=CONFIGURATIONS, data=st.data())
@torch.no_grad()
def test_pieces_equal_the_whole(configuration, data):
    fields, section = fields_of(configuration)
    model = build(**fields)
    heights, tiles = data.draw(cuts(6 // section))
    pixels = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    whole = model(pixels)
    tokens, pooled, cache = encode_pieces(model, cut(pixels, heights, section, tiles))
    assert_same(tokens, whole.last_hidden_state)
    assert_same(pooled, whole.pooler_output)
    assert (cache.num_images, cache.num_rows, cache.num_tokens) == (1, 6, whole.last_hidden_state.shape[1])


@settings(max_examples=20, deadline=None)
@given(configuration=CONFIGURATIONS, data=st.data())
@torch.no_grad()
def test_pieces_of_an_image_of_another_size_equal_the_whole(configuration, data):
    fields, section = fields_of(configuration)
    model = build(**fields)
    rows, columns = data.draw(st.sampled_from([2, 3])), data.draw(st.sampled_from([1, 4]))
    heights, tiles = data.draw(cuts(rows))
    size = (rows * section * PATCH, columns * section * PATCH)
    pixels = torch.randn(1, 3, *size, dtype=torch.float64)
    whole = model(pixels, any_size=True)
    pieces = cut(pixels, heights, section, tiles)
    tokens, pooled, _ = encode_pieces(model, pieces, image_size=size)
    assert_same(tokens, whole.last_hidden_state)
    assert_same(pooled, whole.pooler_output)
    if not fields["use_absolute_position_embeddings"]:
        cache = DefocusVisionCache()
        pieces = cut(pixels, heights, section)
        parts = [model(piece, any_size=True, past_key_values=cache, final=False) for piece in pieces[:-1]]
        parts.append(model(pieces[-1], any_size=True, past_key_values=cache, final=True))
        assert_same(torch.cat([part.last_hidden_state for part in parts], dim=1), whole.last_hidden_state)


@pytest.mark.parametrize("mixer", MIXERS)
def test_pieces_in_float32_and_the_gradient_through_them(mixer):
    model = build(mixer=mixer, num_registers=1).float()
    pixels = torch.randn(2, 3, 24, 24, requires_grad=True)
    whole = model(pixels)
    (expected,) = torch.autograd.grad(whole.pooler_output.square().sum(), pixels)
    tokens, pooled, _ = encode_pieces(model, cut(pixels, [1, 2, 3]))
    (gradient,) = torch.autograd.grad(pooled.square().sum(), pixels)
    assert_same(tokens, whole.last_hidden_state, 1e-4)
    assert_same(gradient, expected, 1e-4)


@settings(max_examples=20, deadline=None)
@given(configuration=CONFIGURATIONS, data=st.data())
@torch.no_grad()
def test_frames_are_one_sequence_whole_or_in_pieces(configuration, data):
    fields, section = fields_of(configuration)
    model = build(**fields)
    frames = torch.randn(1, 4, 3, 24, 24, dtype=torch.float64)
    whole = model(frames)
    first, cache = model(frames[:, :1], use_cache=True), None
    cache = first[-1]
    tokens, pooled = [first.last_hidden_state], [first.pooler_output]
    heights, tiles = data.draw(cuts(6 // section))
    part, pool, _ = encode_pieces(model, cut(frames[:, 1], heights, section, tiles), cache)
    tokens.append(part)
    pooled.append(pool[:, None])
    rest = model(frames[:, 2:], past_key_values=cache)
    assert_same(torch.cat([*tokens, rest.last_hidden_state], dim=1), whole.last_hidden_state)
    assert_same(torch.cat([*pooled, rest.pooler_output], dim=1), whole.pooler_output)
    assert cache.num_images == 4
    assert whole.pooler_output.shape == (1, 4, 32)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_frames_remember_and_images_do_not(mixer):
    model = build(mixer=mixer)
    frames = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    sequence, images = model(frames[None]).last_hidden_state, model(frames).last_hidden_state
    assert_same(sequence[:, :37], images[:1])
    assert (sequence[:, 37:] - images[1:]).abs().max() > 1e-3


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_forks_share_memory_and_go_their_own_ways(mixer):
    broadcasting = "none" if mixer == "mamba" else "mean"
    model = build(mixer=mixer, context_broadcasting=broadcasting)
    upper, one, other = (torch.randn(1, 3, 12, 24, dtype=torch.float64) for _ in range(3))
    cache = model(upper, use_cache=True)[-1]
    fork = cache.fork()
    assert fork.num_bytes == cache.num_bytes
    assert next(iter(vars(fork.layers[0].mixer).values())) is next(iter(vars(cache.layers[0].mixer).values()))
    continued = model(one, past_key_values=cache).last_hidden_state
    branched = model(other, past_key_values=fork).last_hidden_state
    assert_same(continued, model(torch.cat([upper, one], dim=2)).last_hidden_state[:, 18:])
    assert_same(branched, model(torch.cat([upper, other], dim=2)).last_hidden_state[:, 18:])


@pytest.mark.parametrize("mixer", ["retention", "mamba"])
@torch.no_grad()
def test_the_state_of_retention_and_mamba_is_constant_in_size(mixer):
    model = build(mixer=mixer, context_broadcasting="none" if mixer == "mamba" else "mean")
    cache, sizes = DefocusVisionCache(), []
    for _ in range(3):
        model(torch.randn(1, 2, 3, 24, 24, dtype=torch.float64), past_key_values=cache)
        sizes.append(cache.num_bytes)
    assert sizes[0] == sizes[1] == sizes[2]
    numbers = {"retention": 4 * 8 * 8 + 32, "mamba": 64 * (4 + 3)}
    assert sizes[0] == 2 * 8 * numbers[mixer]


@torch.no_grad()
def test_the_state_of_attention_is_its_keys_and_values():
    model = build()
    cache = model(torch.randn(1, 3, 24, 24, dtype=torch.float64), use_cache=True)[-1]
    model(torch.randn(1, 3, 8, 24, dtype=torch.float64), past_key_values=cache)
    assert cache.num_tokens == 37 + 12
    assert cache.num_bytes == 2 * 8 * 2 * 32 * cache.num_tokens


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_a_reordered_cache_continues_the_chosen_sequences(mixer):
    model = build(mixer=mixer, class_token=False, num_registers=1, aux_loss="none")
    pixels = torch.randn(3, 3, 24, 24, dtype=torch.float64)
    cache = model(pixels[:, :, :8], use_cache=True)[-1]
    chosen = torch.tensor([2, 0, 2, 1])
    cache.reorder_cache(chosen)
    assert cache.batch_size == 4
    rest = model(pixels[chosen][:, :, 8:], past_key_values=cache)
    whole = model(pixels[chosen])
    assert_same(rest.last_hidden_state, whole.last_hidden_state[:, 12:])
    assert_same(rest.pooler_output, whole.pooler_output)


@torch.no_grad()
def test_rows_of_sections_count_when_they_are_whole():
    model = build(patch_order="sections", section_size=2)
    pixels = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    cache, rows = DefocusVisionCache(), []
    for piece in cut(pixels, [1, 1, 1], section=2, tiles=(0, 1, 2)):
        model(piece, past_key_values=cache)
        rows.append((cache.num_rows, cache.image.missing_rows, cache.in_image))
    assert rows == [(0, 6, True)] * 2 + [(2, 4, True)] * 3 + [(4, 2, True)] * 3 + [(6, 0, False)]


@torch.no_grad()
def test_positions_are_interpolated_once_an_image_and_not_kept(monkeypatch):
    model = build()
    interpolate, calls = torch.nn.functional.interpolate, []
    monkeypatch.setattr("torch.nn.functional.interpolate", lambda *a, **k: calls.append(1) or interpolate(*a, **k))
    pieces = torch.randn(1, 3, 16, 16, dtype=torch.float64).split(4, dim=2)
    _, _, cache = encode_pieces(model, pieces, image_size=(16, 16))
    assert len(calls) == 1
    assert cache.image.positions is None


@torch.no_grad()
def test_a_bounded_state_starts_where_the_mixer_says(monkeypatch):
    model = build()
    monkeypatch.setattr(type(model.layers[0].mixer), "start_state", lambda self, window: ("window", window))
    seen = []
    monkeypatch.setattr(
        type(model.layers[0].mixer), "forward", lambda self, tokens, state: seen.append(state) or (tokens, "next")
    )
    cache = DefocusVisionCache(attention_window=7)
    for _ in range(2):
        model(torch.randn(1, 3, 12, 24, dtype=torch.float64), past_key_values=cache)
    assert seen == [("window", 7)] * 2 + ["next"] * 2
    with pytest.raises(ValueError, match="attention_window must be positive, in tokens, not 0"):
        DefocusVisionCache(attention_window=0)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), window=st.sampled_from([5, 40, 111]))
@torch.no_grad()
def test_a_bounded_state_of_attention_depends_on_no_split_and_states_its_error(data, window):
    model = build()
    for layer in model.layers:
        layer.mixer.band_pass.lambda_hat.fill_(0.0)  # lambda = -1
    frames = torch.randn(3, 1, 3, 24, 24, dtype=torch.float64)
    exact, bounded, split = DefocusVisionCache(), DefocusVisionCache(window), DefocusVisionCache(window)
    assert bounded.error_bounds is None
    for frame in frames:
        expected = model(frame, past_key_values=exact).last_hidden_state
        output = model(frame, past_key_values=bounded).last_hidden_state
        heights, tiles = data.draw(cuts(6))
        tokens, _, _ = encode_pieces(model, cut(frame, heights, 1, tiles), split)
        assert_same(tokens, output)
        assert_same(output, expected, {5: 1e-2, 40: 1e-9, 111: 1e-9}[window])
    assert exact.error_bounds is None
    assert bounded.error_bounds.shape == (2, 1, 4)
    assert (bounded.error_bounds.max() > 0) == (window == 5), "beyond, e^-40 is nothing, or nothing has left"
    assert bounded.num_bytes == split.num_bytes


def refusal(model, pixels, cache=None, **kwargs):
    """The message of the error, after which the cache must be what it was."""
    before = None if cache is None else (cache.num_tokens, cache.num_rows, list(cache.layers))
    with pytest.raises(ValueError, match=r"\w") as error:
        model(pixels, use_cache=True, past_key_values=cache, **kwargs)
    assert before is None or before == (cache.num_tokens, cache.num_rows, list(cache.layers))
    return str(error.value)


@torch.no_grad()
def test_what_is_no_next_piece_is_refused_and_changes_nothing():
    model = build(use_absolute_position_embeddings=False)
    pixels = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    cache = model(pixels[:, :, :16], use_cache=True)[-1]
    assert "3 rows of patches, but the image lacks only 2 of its 6" in refusal(model, pixels[:, :, :12], cache)
    assert "height 6 and width 24 must be multiples of 4" in refusal(model, pixels[:, :, :6], cache)
    assert "2 x 3 patches are not the next piece of an image of 6 columns" in refusal(
        model, pixels[:, :, :8, :12], cache
    )
    assert "batch of 1, but the cache one of 2" in refusal(model, pixels[:1, :, :4], cache)
    assert "(batch, 3, height, width), not (2, 1, 4, 24)" in refusal(model, pixels[:, :1, :4], cache)
    assert "the current one lacks 2 rows" in refusal(model, pixels[:, None], cache)
    assert "final=True, but 1 of its 6 rows" in refusal(model, pixels[:, :, :4], cache, final=True)
    assert "final=False, but this piece ends the image" in refusal(model, pixels[:, :, :8], cache, final=False)
    assert "(16, 24) is not the size" in refusal(model, pixels[:, :, :4], cache, image_size=(16, 24))
    assert "of an encoder of 2 blocks, this one has 3" in refusal(build(num_hidden_layers=3), pixels[:, :, :8], cache)
    model(pixels[:, :, :4, :8], past_key_values=cache)
    assert "4 columns of the current row are missing" in refusal(model, pixels[:, :, :4], cache)
    assert cache.image.missing_rows == 2
    assert "say how high the image is" in refusal(model, pixels, any_size=True)
    assert "must be multiples of 4" in refusal(model, pixels, image_size=(22, 24))
    positions = build()
    assert "give its size first" in refusal(positions, pixels, any_size=True, final=False)
    with pytest.raises(ValueError, match="image_size and final are for pieces"):
        model(pixels, image_size=(24, 24))


@torch.no_grad()
def test_an_error_in_the_middle_leaves_the_cache_usable(monkeypatch):
    model = build()
    pixels = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    cache = model(pixels[:, :, :8], use_cache=True)[-1]
    with monkeypatch.context() as patch:
        patch.setattr(model.layers[1], "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(pixels[:, :, 8:], past_key_values=cache)
    rest = model(pixels[:, :, 8:], past_key_values=cache).last_hidden_state
    assert_same(rest, model(pixels).last_hidden_state[:, 12:])


def test_a_non_causal_encoder_refuses_pieces_and_frames():
    model = build(causal=False)
    for arguments in ({"use_cache": True}, {"past_key_values": DefocusVisionCache()}):
        with pytest.raises(ValueError, match="causal=False: this encoder sees whole images only"):
            model(torch.randn(1, 3, 24, 24, dtype=torch.float64), **arguments)
    with pytest.raises(ValueError, match="causal=False"):
        model(torch.randn(1, 2, 3, 24, 24, dtype=torch.float64))


def test_gradient_checkpointing_refuses_a_cache_only_where_it_recomputes():
    model = build().train()
    model.activation_checkpointing_enable()
    pixels = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(pixels[:, :, :8], past_key_values=DefocusVisionCache())
    with torch.no_grad():
        tokens, _, _ = encode_pieces(model, cut(pixels, [2, 4]))
    assert_same(tokens, model(pixels).last_hidden_state)


@torch.no_grad()
def test_hidden_states_of_a_piece_are_recorded():
    model = build()
    pixels = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    whole = model(pixels, output_hidden_states=True)
    cache = model(pixels[:, :, :8], use_cache=True)[-1]
    rest = model(pixels[:, :, 8:], past_key_values=cache, output_hidden_states=True)
    assert len(rest.hidden_states) == 3
    for part, hidden_states in zip(rest.hidden_states, whole.hidden_states, strict=True):
        assert_same(part, hidden_states[:, 12:])
    assert rest.past_key_values is cache
    assert whole.past_key_values is None


def test_a_classifier_refuses_frames():
    config = DefocusVisionConfig(image_size=24, patch_size=PATCH, num_labels=3, **SIZES)
    with pytest.raises(ValueError, match=r"must have shape \(batch, channels, height, width\)"):
        DefocusForImageClassification(config)(torch.randn(1, 2, 3, 24, 24))
