"""What the project claims about its speed and memory, as limits that a measurement keeps or misses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Show:
    """One claim: a limit on the ratio of costs, ours to the peer's."""

    name: str
    """How comparisons refer to it."""
    claim: str
    """The claim in words."""
    limit: float
    """The number in the claim."""
    kind: Literal["cost", "speed"] = "cost"
    """A cost (ours / peer) may be `limit` at most; a speed (peer / ours) must be `limit` at least."""

    def measured(self, ratio: float) -> float:
        """The number that the limit is about, from ours / peer."""
        return ratio if self.kind == "cost" else 1 / ratio

    def holds(self, ratio: float) -> bool:
        """Whether ours / peer keeps the limit."""
        return ratio <= self.limit if self.kind == "cost" else 1 / ratio >= self.limit

    def describe(self) -> dict[str, Any]:
        """The threshold as `results.json` holds it."""
        return {"kind": "at most" if self.kind == "cost" else "at least", "limit": self.limit, "claim": self.claim}


_ALL = (
    Show("attention_short", "Attention core, forward at 197 tokens: at most 1.25x plain causal SDPA", 1.25),
    Show("attention_long", "Attention core, forward at 577 tokens and above: at most 1.15x plain causal SDPA", 1.15),
    Show(
        "attention_bidirectional",
        "Attention core, forward at 1,025 tokens and above: faster than bidirectional SDPA",
        1,
    ),
    Show("attention_backward", "Attention core, forward + backward: at most 1.3x plain causal SDPA", 1.3),
    Show("vit_forward", "De-focus ViT, forward: at most 1.05x CLIPVisionModel", 1.05),
    Show("mamba_plain", "De-focus Mamba without a compiler: at least 3.5x faster than MambaModel", 3.5, "speed"),
    Show("mamba_compiled", "De-focus Mamba with the compiled core: at least 7x faster than MambaModel", 7, "speed"),
    Show("mamba_forward", "De-focus Mamba with the compiled core, forward: at most 1.25x CLIPVisionModel", 1.25),
    Show("mamba_memory", "Training step of De-focus Mamba: at most 2x the peak memory of a ViT of equal width", 2),
    Show("growth_retention", "Retention, time per token at 16,384 tokens: at most 1.15x that at 1,024", 1.15),
    Show("growth_mamba", "Mamba, time per token at 16,384 tokens: at most 1.15x that at 1,024", 1.15),
    Show(
        "growth_attention",
        "Attention with strongly decaying heads, time per token at 16,384 tokens: at most 1.15x that at 1,024",
        1.15,
    ),
    Show("push_retention", "Stream with retention: row 100 costs at most 1.2x row 2", 1.2),
    Show("push_mamba", "Stream with mamba: row 100 costs at most 1.2x row 2", 1.2),
    Show("first_answer", "Last row to first answer token, stream: at most 0.5x the batch path", 0.5),
    Show("first_token", "Time to first token: at most 1x LlavaForConditionalGeneration", 1),
    Show("decoding", "Decoding, tokens/s: at least 1x LlavaForConditionalGeneration", 1, "speed"),
)
SHOWS = {show.name: show for show in _ALL}
"""Every claim by its name."""
