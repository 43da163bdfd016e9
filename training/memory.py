"""How much memory a run will take, estimated before it begins."""

from __future__ import annotations

from typing import Any

from training.freezing import FreezePlan
from training.loop import TrainingLoop
from training.stage import Stage

GIB, MIB = 2**30, 2**20


def describe_memory(loop: TrainingLoop, stage: Stage, freeze: FreezePlan) -> list[str]:
    """Lines for the log: the memory of a process, part by part. What is sharded is counted as if it were not.

    - weights: as they are stored; in mixed precision also a 16-bit copy of those that learn
    - gradients: 4 bytes a trained parameter
    - optimizer: 8 bytes, the two moments of AdamW; 4 more for their average, if one is kept
    - activations: see `activation_bytes`
    """
    trained = freeze.trainable_parameters
    copies = 2 * trained if loop.arguments.mixed_precision == "bf16" else 0
    parts = {
        "weights": sum(weight.numel() * weight.element_size() for weight in stage.model.parameters()) + copies,
        "gradients": 4 * trained,
        "optimizer": 8 * trained + (4 * trained if loop.average else 0),
    }
    known = "activations come on top"
    if stage.estimate_activations:
        parts["activations"] = stage.estimate_activations(loop.plan.per_device_batch_size)
        known = "activations for the longest sample seen"
    total = sum(parts.values())
    unit, name = (GIB, "GiB") if total >= GIB else (MIB, "MiB")
    shown = " + ".join(f"{part} {size / unit:,.1f}" for part, size in parts.items())
    return [
        f"memory of a process, estimated: {shown} = {total / unit:,.1f} {name} ({known}; as if nothing were sharded)"
    ]


def activation_bytes(
    config: Any, tokens: int, bytes_per_value: int, recomputed: bool, learns: bool = True, vocabulary: int = 0
) -> int:
    """What a stack of decoder layers keeps of one micro-batch for its backward pass, in bytes.

    Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), equation 1
    without the attention scores, which fused attention does not keep: 34 bytes a token, layer and hidden unit in 16
    bits, that is 17 values. Recomputed, a layer keeps its input (1 value), and one layer at a time has all.

    Args:
        config: with `hidden_size` and `num_hidden_layers`.
        tokens: in the micro-batch.
        bytes_per_value: of a stored activation.
        recomputed: whether layers are checkpointed.
        learns: whether gradients pass through the stack; if not, nothing is kept.
        vocabulary: of the output layer, for its logits: as computed, in float32, and their gradient.
    """
    layer = tokens * config.hidden_size * bytes_per_value
    layers = config.num_hidden_layers
    if not learns:
        return 17 * layer
    kept = layers * layer + 17 * layer if recomputed else 17 * layers * layer
    return kept + tokens * vocabulary * (bytes_per_value + 8)
