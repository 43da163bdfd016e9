"""Where the model to be evaluated lies: a folder, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from defocus_mllm.loading import require_model

_REPOSITORY = re.compile(r"(?P<name>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?")
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Checkpoint:
    """A saved model and processor on this machine; `revision` is the commit of what came from the Hub."""

    folder: Path
    name: str
    revision: str | None = None


def find_checkpoint(model: str | Path) -> Checkpoint:
    """The checkpoint called `model`: a folder or, where there is none of that name, "USER/NAME[@REVISION]" on the Hub.

    What the Hub's local cache holds is not downloaded again; with HF_HUB_OFFLINE=1 nothing is downloaded at all.

    Raises:
        FileNotFoundError: there is neither such a folder nor such a repository, or it holds no whole model.
    """
    folder = Path(model)
    found = _REPOSITORY.fullmatch(str(model))
    if folder.exists() or not found:
        require_model(folder, "--model")
        return Checkpoint(folder, folder.resolve().name)
    name, revision = found["name"], found["revision"]
    try:
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).split("\n")[0]
        raise FileNotFoundError(
            f"--model: there is no folder {model}, and {name} cannot be had from the Hub: {reason}"
        ) from error
    require_model(snapshot, "--model")
    return Checkpoint(snapshot, name, snapshot.name)
