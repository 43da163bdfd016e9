"""The encoder inside another model of Transformers, which must not look for its class token in the wrong place."""

from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

# The model that drops the first token whatever its configuration says.
_DROPS_ALWAYS = ("vipllava",)


def refuse_dropped_patch(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Refuse to become part of a model that drops the first token, as the class token that it is in a CLIP encoder.

    Here it is the first patch, and the class token is the last token. PyTorch calls this for every module that becomes
    part of another (an encoder cannot see from inside what is done with its tokens).

    Raises:
        ValueError: `child` is an encoder, and `parent` a LLaVA (or its like) of that configuration.
    """
    if getattr(getattr(child, "config", None), "model_type", None) != "defocus_vision":
        return
    # as an attribute of its own: what PEFT wraps a module in looks attributes up in the module it does not have yet
    config: Any = vars(parent).get("config")
    host = type(config).__name__
    if getattr(config, "model_type", None) in _DROPS_ALWAYS:
        raise ValueError(f"{host}: this model always drops the first token, which here is a patch; use LLaVA instead")
    if getattr(config, "vision_feature_select_strategy", None) == "default":
        raise ValueError(
            f"{host}: vision_feature_select_strategy='default' drops the first token, which here is a patch (the class "
            "token is the last); set vision_feature_select_strategy='full' and vision_feature_layer=-1"
        )


register_module_module_registration_hook(refuse_dropped_patch)

__all__ = ["refuse_dropped_patch"]
