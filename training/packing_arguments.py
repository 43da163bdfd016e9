"""Arguments of how conversations of different lengths share a micro-batch; stages 1 and 2 have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class PackingArguments:
    """Padding avoided by packing samples into rows, or by taking samples of like length together."""

    packing: Literal["none", "pack"] = "none"
    """pack: whole samples share rows of up to max_length tokens, and none sees another; steps learn the same."""
    group_by: Literal["none", "length", "modality_length"] = "none"
    """Steps made of samples of like length, with modality_length also with images or without; not with packing."""

    def check_packing(self, streaming: bool) -> None:
        """Raise `ValueError` where both are asked for, or either for a stream."""
        for name in ("packing", "group_by"):
            if streaming and getattr(self, name) != "none":
                raise ValueError(f"{name}: needs the lengths of all conversations, which a stream does not tell")
        if self.packing != "none" and self.group_by != "none":
            raise ValueError(
                f"group_by: {self.group_by} cannot go with packing: {self.packing}, whose rows are full whatever the "
                "lengths; leave one of the two out"
            )
