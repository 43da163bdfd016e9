"""Run lmms-eval itself on a tiny model, in an environment made for it: `make harness-tests`.

    python tests/eval/harnesses/run.py [pytest arguments]

The environment sees the packages of the one that runs this script and adds lmms-eval without the dependencies that it
lists, torchvision among them, and with those that it imports (the extra `lmms-eval` of pyproject.toml). It is made
once, in a cache (`DEFOCUS_CACHE`, or the user's cache folder). Exits with 1 if a test fails, and with 0 and the reason
if lmms-eval cannot be had.
"""

from __future__ import annotations

import hashlib
import os
import site
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SHOW = Path(__file__).with_name("test_lmms_eval.py")
LMMS_EVAL = "lmms-eval==0.7.3"


class Unavailable(Exception):
    """lmms-eval cannot be had here; the message says why."""


def requirements() -> list[str]:
    """What lmms-eval imports, and what installs this project."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return [*project["project"]["optional-dependencies"]["lmms-eval"], *project["build-system"]["requires"]]


def environment_folder() -> Path:
    """Where the environment is kept; another one for other requirements, or beside other packages."""
    made_of = [
        LMMS_EVAL,
        *requirements(),
        (ROOT / "constraints.txt").read_text(encoding="utf-8"),
        *site.getsitepackages(),
    ]
    digest = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:12]
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "defocus_mllm"
    return Path(os.environ.get("DEFOCUS_CACHE", default)) / f"lmms-eval-{digest}"


def pip(environment: Path, *arguments: str) -> None:
    """Call pip in an environment.

    Raises:
        Unavailable: it failed, as it does without a network.
    """
    command = [environment / "bin" / "python", "-m", "pip", "--disable-pip-version-check", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        reason = next((line for line in finished.stderr.splitlines() if line.startswith("ERROR")), finished.stderr)
        raise Unavailable(f"pip {arguments[0]}: {reason.strip() or 'it gave no reason'}")


def make_environment() -> Path:
    """The environment, made on the first call.

    Raises:
        Unavailable: see `pip`.
    """
    folder = environment_folder()
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            building = Path(temporary) / "finished"
            print(f"installing {LMMS_EVAL} into {folder}", flush=True)
            subprocess.run([sys.executable, "-m", "venv", building], check=True)
            (packages,) = building.glob("lib/python*/site-packages")
            (packages / "project.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
            pip(building, "install", "-q", "--no-deps", LMMS_EVAL)
            pip(building, "install", "-q", *requirements())
            building.rename(folder)
    return folder


def main(arguments: list[str]) -> int:
    """Make the environment, install this project into it, run the tests; returns the exit status."""
    try:
        environment = make_environment()
    except Unavailable as reason:
        print(f"harness tests skipped: {reason}")
        return 0
    try:
        pip(environment, "install", "-q", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    except Unavailable as reason:
        print(f"error: this project cannot be installed: {reason}")
        return 1
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [environment / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--disable-warnings"]
    return subprocess.run([*command, *arguments, SHOW], env=variables, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
