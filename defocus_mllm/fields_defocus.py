"""Fields that a configuration does not know: a typo in code is an error, one in a file, which others wrote, is not."""

import difflib
from contextvars import ContextVar
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Keys that Transformers itself passes beside the declared fields; everything else that is undeclared is a typo.
_KEYS_OF_TRANSFORMERS = frozenset(
    {"attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "num_labels"}
    | {"output_attentions", "per_layer_config", "quantization_config", "tie_word_embeddings", "torch_dtype"}
)
# Whether the fields come from a file.
_READING = ContextVar("reading", default=False)


class DefocusConfigReader:
    """Reads configurations whose file may hold fields that only another release or another tool knows."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in Transformers; unknown fields are kept, and named in a warning, where the constructor refuses them."""
        token = _READING.set(True)
        try:
            return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        finally:
            _READING.reset(token)


def refuse_unknown_fields(config: PreTrainedConfig, extras: dict[str, Any]) -> None:
    """Raise `ValueError` for a field that neither the config nor Transformers knows (a typo must not be ignored).

    In a file, which whoever reads it did not write, such a field is only warned of.
    """
    for name in extras:
        if name.startswith("_") or name in _KEYS_OF_TRANSFORMERS:
            continue
        nearest = difflib.get_close_matches(name, type(config).__dataclass_fields__, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        message = f"{type(config).__name__}: unknown field {name!r}{hint}"
        if not _READING.get():
            raise ValueError(message)
        logger.warning(f"{message}; it changes nothing")


__all__ = ["DefocusConfigReader", "refuse_unknown_fields"]
