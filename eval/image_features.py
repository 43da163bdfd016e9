"""What the encoder makes of an image, kept for the next question about it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

_BYTE_BUDGET = 512 * 2**20


class ImageFeatures:
    """Encodes every image once for all questions about it; the least recently used leave beyond `byte_budget`.

    Args:
        model: a `DefocusForConditionalGeneration`, which takes features in place of pixels.
        byte_budget: memory for features, on the model's device.
    """

    def __init__(self, model: Any, byte_budget: int = _BYTE_BUDGET) -> None:
        self._model = model
        self._byte_budget = byte_budget
        self._bytes_held = 0
        self._features: OrderedDict[Path, torch.Tensor] = OrderedDict()

    def of(
        self, paths: Sequence[Path], read: Callable[[Sequence[Path]], torch.Tensor]
    ) -> dict[str, BaseModelOutputWithPooling]:
        """The model's argument `mm_encoder_outputs` for these images; `read` gives the pixels of those not kept."""
        found = {path: self._features[path] for path in paths if path in self._features}
        new = [path for path in dict.fromkeys(paths) if path not in found]
        if new:
            encoded = self._model.get_image_features(read(new), return_dict=True)
            found |= dict(zip(new, encoded.pooler_output, strict=True))
        self._keep(found)
        output = BaseModelOutputWithPooling()
        output["pooler_output"] = [found[path] for path in paths]  # a list, as the model's own
        return {"image": output}

    def __contains__(self, path: Path) -> bool:
        return path in self._features

    def forget(self) -> None:
        """Encode every image anew from now on."""
        self._features.clear()
        self._bytes_held = 0

    def _keep(self, found: dict[Path, torch.Tensor]) -> None:
        for path, features in found.items():
            if path not in self._features:
                # A copy: a slice would keep the features of its whole batch alive.
                self._features[path] = features.clone()
                self._bytes_held += features.nbytes
            self._features.move_to_end(path)
        while self._bytes_held > self._byte_budget and self._features:
            _, oldest = self._features.popitem(last=False)
            self._bytes_held -= oldest.nbytes
