"""Run the common tests of Transformers, taken from its source distribution, against the classes of this project.

    python tests/upstream/run.py [pytest arguments]

The source distribution of the installed release is downloaded once into a cache (`DEFOCUS_CACHE`, or the user's cache
folder); nothing of it enters the repository. Prints what passed, failed and was skipped, why, and which tests are
overridden, why. Exits with 1 if a test fails, and with 0 and the reason if the tests cannot be had.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path

import transformers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SUITES = ("encoder_suite.py", "multimodal_suite.py", "processor_suite.py")
# What the tests import beside what this project installs; it goes into the cache, not into the environment.
PARAMETERIZED = "parameterized==0.9.0"
PACKAGE = "upstream_tests"
OUTCOMES = ("passed", "failed", "skipped")


class Unavailable(Exception):
    """The tests of Transformers cannot be had here; the message says why."""


def cache_folder() -> Path:
    """Where the tests of the installed release are kept."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "defocus_mllm"
    return Path(os.environ.get("DEFOCUS_CACHE", default)) / f"transformers-{transformers.__version__}-tests"


def pip(*arguments: str) -> None:
    """Call pip.

    Raises:
        Unavailable: it failed, as it does without a network.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        reason = next((line for line in finished.stderr.splitlines() if line.startswith("ERROR")), finished.stderr)
        raise Unavailable(f"pip {arguments[0]} {arguments[-1]}: {reason.strip() or 'it gave no reason'}")


def unpack_tests(archive: Path, folder: Path) -> None:
    """Copy tests/*.py of a source distribution to `folder`, which becomes a package.

    Raises:
        Unavailable: the distribution holds no common tests.
    """
    folder.mkdir()
    (folder / "__init__.py").touch()
    with tarfile.open(archive) as source:
        for member in source.getmembers():
            path = Path(member.name)
            if path.parts[1:2] == ("tests",) and len(path.parts) == 3 and path.suffix == ".py" and member.isfile():
                content = source.extractfile(member)
                assert content is not None  # it is a file
                (folder / path.name).write_bytes(content.read())
    if not (folder / "test_modeling_common.py").is_file():
        raise Unavailable(f"{archive.name} contains no tests/test_modeling_common.py")


def fetch() -> Path:
    """Return the folder with the package of upstream's tests and with what they import; fill it on the first call.

    Raises:
        Unavailable: see `pip` and `unpack_tests`.
    """
    cache = cache_folder()
    if not cache.is_dir():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as temporary:
            building = Path(temporary) / "finished"
            building.mkdir()
            release = f"transformers=={transformers.__version__}"
            print(f"downloading the source distribution of {release}", flush=True)
            pip("download", "-q", "--no-deps", "--no-binary", "transformers", "-d", temporary, release)
            unpack_tests(next(Path(temporary).glob("transformers-*.tar.gz")), building / PACKAGE)
            pip("install", "-q", "--no-deps", "--target", str(building), PARAMETERIZED)
            building.rename(cache)
    return cache


def run_suites(cache: Path, report: Path, arguments: list[str]) -> int:
    """Run pytest on the suites, writing a JUnit report; return its exit status."""
    paths = [str(cache), str(HERE), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb", "short"]
    # Their marks are not ours to declare.
    command += ["-o", "addopts=--import-mode=importlib", "--disable-warnings"]
    command += ["-n", "2", "--dist", "worksteal", f"--junitxml={report}", *arguments]
    return subprocess.run([*command, *(str(HERE / suite) for suite in SUITES)], env=environment, cwd=ROOT).returncode


def outcome(case: ElementTree.Element) -> str:
    """What became of a test case of a JUnit report."""
    tags = {child.tag for child in case}
    return "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"


def summarise(report: Path) -> Counter[str]:
    """Print the outcomes of each class and the reasons of the skips; return how often there was which outcome."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        counts[case.get("classname", "").rpartition(".")[2]][outcome(case)] += 1
        skipped = case.find("skipped")
        if skipped is not None:
            reasons[skipped.get("message", "").strip().splitlines()[0]] += 1
    total = sum(counts.values(), Counter())
    print("\nskipped, as Transformers words it:")
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        print(f"  {count:4}  {reason}")
    print(f"\n{'common tests of transformers ' + transformers.__version__:42}" + "".join(f"{o:>9}" for o in OUTCOMES))
    for name, count in [*sorted(counts.items()), ("total", total)]:
        print(f"{name:42}" + "".join(f"{count[outcome]:9}" for outcome in OUTCOMES))
    return total


def main(arguments: list[str]) -> int:
    """Fetch, run, summarise; returns the exit status."""
    from overrides import ADAPTED, NOT_IN_THE_DISTRIBUTION, OVERRIDES

    try:
        cache = fetch()
    except Unavailable as reason:
        print(f"upstream tests skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        status = run_suites(cache, report, arguments)
        if not report.is_file():
            return status or 1
        total = summarise(report)
    for title, entries in (("overridden", OVERRIDES), ("adapted", ADAPTED), ("not run", NOT_IN_THE_DISTRIBUTION)):
        print(f"{title}: {len(entries)}")
        for name, reason in entries.items():
            print(f"  {name}: {reason}")
    if not total["passed"]:
        print("error: no test ran")
    return 1 if total["failed"] or not total["passed"] else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
