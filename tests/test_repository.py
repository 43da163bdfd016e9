"""Rules of the house that no single module can hold: who imports whom, what travels, what the README promises."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from transformers.dynamic_module_utils import get_imports

from defocus_mllm.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("defocus_mllm", "training", "eval", "benchmarks")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SCRIPTS = [ROOT / "Makefile", ROOT / ".ci" / "run", *sorted((ROOT / "training" / "recipes").glob("*.yaml"))]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

FORBIDDEN_IMPORTS = {
    "defocus_mllm": {"training", "eval", "benchmarks"},
    "training": {"eval", "benchmarks"},
    "eval": {"training", "benchmarks"},
    "benchmarks": {"training", "eval"},
}
STAYS_AT_HOME = {"__init__", "cli", "console", "convert", "convert_cli", "files", "images", "inspect", "loading"}
STAYS_AT_HOME |= {
    "adapter_base",
    "adapters",
    "assemble",
    "assemble_checks",
    "assemble_cli",
    "card_cli",
    "merge_cli",
    "provenance",
    "released",
    "released_layout",
}
MAY_TRAVEL_WITH = {"torch", "transformers", "huggingface_hub"}
# What a file imports only if it is there: in a `try`, where Transformers does not ask for it when it loads remote code.
OPTIONAL_FOR = {"triton_scan_defocus": {"triton"}}
# A script started by its path has its own folder first on sys.path, where such a name would hide the real module.
NAMES_OF_LIBRARIES = {"accelerate", "datasets", "evaluate", "peft", "tokenizers", "torch", "transformers", "yaml"}
ABSOLUTE_PATH = re.compile(r"/(?:home|mnt|work|root|data|tmp|Users|scratch)/")
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
MAXIMUM_FILE_LINES = 400
MAXIMUM_FUNCTION_LINES = 50


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[int, str | None]]:
    """(level, module) of every import in a file, those inside functions and `if TYPE_CHECKING` included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module


def strings(path: Path) -> list[str]:
    """The string constants of a Python file; the words of any other."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return re.findall(r"[^\s\"'=]+", text)
    constants = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
    return [value for value in constants if isinstance(value, str)]


def shell_commands(page: Path) -> list[str]:
    """Lines of the page's ```bash blocks, comments removed."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = (line.split("#")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line]


def test_the_sources_are_found() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(PACKAGES)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_in_one_direction(path: Path) -> None:
    forbidden = FORBIDDEN_IMPORTS[path.relative_to(ROOT).parts[0]]
    used = {module.split(".")[0] for level, module in imports(path) if level == 0 and module}
    assert not used & forbidden


@pytest.mark.parametrize("path", sorted((ROOT / "defocus_mllm").glob("*.py")), ids=name_of)
def test_travelling_files_need_only_their_siblings_and_common_libraries(path: Path) -> None:
    if path.stem in STAYS_AT_HOME:
        return
    allowed = MAY_TRAVEL_WITH | sys.stdlib_module_names | OPTIONAL_FOR.get(path.stem, set())
    for level, module in imports(path):
        if level == 0:
            assert module is not None
            assert module.split(".")[0] in allowed, f"{name_of(path)} imports {module}, which a checkpoint cannot bring"
        else:
            assert level == 1, f"{name_of(path)}: only `from .sibling import name` travels"
            assert module, f"{name_of(path)}: only `from .sibling import name` travels"
            assert module not in STAYS_AT_HOME, f"{name_of(path)} imports {module}, which does not travel"
            assert (path.parent / f"{module}.py").is_file(), f"{name_of(path)}: no sibling {module}.py"


@pytest.mark.parametrize("name", OPTIONAL_FOR)
def test_remote_code_loads_without_an_optional_library(name: str) -> None:
    path = ROOT / "defocus_mllm" / f"{name}.py"
    assert OPTIONAL_FOR[name] <= {module for _, module in imports(path)}
    assert not OPTIONAL_FOR[name] & set(get_imports(path))


def test_the_model_package_is_flat() -> None:
    assert [path for path in (ROOT / "defocus_mllm").rglob("*.py") if path.parent.name != "defocus_mllm"] == []


@pytest.mark.parametrize("package", ["training", "eval", "benchmarks"])
def test_no_module_hides_a_library(package: str) -> None:
    names = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__", "__main__"}
    assert not names & (NAMES_OF_LIBRARIES | sys.stdlib_module_names)


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=name_of)
def test_nothing_unfinished_machine_bound_or_waiting(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not UNFINISHED.search(text)
    assert [string for string in strings(path) if ABSOLUTE_PATH.match(string)] == [], "a path of one machine"
    assert not re.search(r"\bsleep\s*\(|^\s*sleep\s", text, re.MULTILINE), "waits for a time instead of an event"
    assert not re.search(r"type\s*=\s*bool\b", text), "argparse takes every non-empty string for true"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < MAXIMUM_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAXIMUM_FUNCTION_LINES, f"{node.name} in {name_of(path)}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_modules_public_classes_and_functions_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has no docstring"
    definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    bare = [node.name for node in definitions if not node.name.startswith("_") and not ast.get_docstring(node)]
    assert bare == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_documented_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for command in shell_commands(page):
        for target in re.findall(r"\bmake ([a-z]+)", command):
            assert target in targets, f"{command!r}: the Makefile has no target {target!r}"
        for module in re.findall(r"python -m ((?:training|eval|benchmarks|defocus_mllm)[\w.]*)", command):
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), f"{command!r}: no module {module}"
        for script in re.findall(r"(?:python|accelerate launch) ((?:training|eval)/\S+\.py)", command):
            assert (ROOT / script).is_file(), f"{command!r}: no script {script}"
        for recipe in re.findall(r"training/recipes/\S+\.yaml", command):
            assert (ROOT / recipe).is_file(), f"{command!r}: no recipe {recipe}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_documented_chat_commands_parse(page: Path) -> None:
    for command in shell_commands(page):
        match = re.search(r"(?:^|/|\s)defocus-mllm (.*)", command)
        if match:
            words = [word.strip("\"'") for word in re.findall(r"\"[^\"]*\"|'[^']*'|\S+", match[1])]
            build_parser().parse_args(words)  # leaves with SystemExit, which fails the test, when it does not parse


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for target in targets:
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.split("#")[0]).exists(), f"{name_of(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_result_is_filled_in(page: Path) -> None:
    assert re.findall(r"RESULT_\w+", page.read_text(encoding="utf-8")) == []


def test_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
