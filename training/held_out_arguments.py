"""Arguments of the conversations that stages 1 and 2 do not learn from, but are measured on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class HeldOutArguments:
    """What is held out, and how often it is looked at."""

    validation_data: str = ""
    """Conversations, in any of the forms of `data`, that nothing is learned from; empty: no validation."""
    validation_image_root: str = ""
    """Folder their image paths start from; empty: image_root or, without that too, the folder of validation_data."""
    validation_steps: int = 0
    """Steps between validations; 0 validates once, after the last step."""
    validation_answers: int = 4
    """Held-out conversations whose first question is answered at each validation, for answers.jsonl."""

    def check_held_out(self) -> None:
        """Raise `ValueError` for the first field that is out of range or has no data to go with."""
        for name in ("validation_steps", "validation_answers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")
        for name in ("validation_steps", "validation_image_root"):
            if getattr(self, name) and not self.validation_data:
                raise ValueError(f"{name}: set, but there is no validation_data")
