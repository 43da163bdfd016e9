"""How tensor parallelism splits the linear layers; by names that both Transformers and vLLM know.

"colwise" then "rowwise" split a pair with nothing but an elementwise function between. What a mixer mixes needs whole
tokens: its first layers are split and their output gathered ("colwise_rep"), its last takes a part of whole tokens
("rowwise_rep"). So every process mixes all heads, and their number need not divide. Replicated are the mixing itself,
its rates and filters, the small projections to mamba's time steps, norms and embeddings.
"""

# Linear layers before the mixing of each mixer.
_BEFORE_MIXING = {"attention": ("qkv",), "retention": ("qkv", "gate"), "mamba": ("in_proj",)}


def encoder_plan(mixer: str) -> dict[str, str]:
    """Name of a linear layer of the encoder -> how it is split."""
    plan = {f"layers.*.mixer.{name}": "colwise_rep" for name in _BEFORE_MIXING[mixer]}
    plan["layers.*.mixer.out_proj"] = "rowwise_rep"
    if mixer != "mamba":
        plan |= {"layers.*.mlp.fc1": "colwise", "layers.*.mlp.fc2": "rowwise"}
    return plan


def projector_plan(projector_type: str) -> dict[str, str]:
    """Name of a linear layer of the projector -> how it is split."""
    if projector_type == "linear":
        return {"multi_modal_projector.linear_1": "colwise_rep"}
    return {"multi_modal_projector.linear_1": "colwise", "multi_modal_projector.linear_2": "rowwise"}


__all__ = ["encoder_plan", "projector_plan"]
