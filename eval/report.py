"""Turn an evaluation and the runs behind it into one self-contained HTML page.

    python -m eval.report --evaluation outputs/quickstart/eval/easy_vqa \\
        --runs outputs/quickstart/stage1 outputs/quickstart/stage2 --output outputs/quickstart/report.html

Reads files only: results.json and samples.jsonl of the evaluation, the benchmark's images, run.json and metrics.jsonl
of each run. Nothing in the page points outside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from defocus_mllm.console import run_script
from defocus_mllm.files import write_text_atomically
from eval.report_data import gather


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, gather, render, write."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--evaluation", required=True, type=Path, metavar="DIR", help="holds results.json, samples.jsonl"
    )
    parser.add_argument("--runs", nargs="*", default=[], type=Path, metavar="DIR", help="run directories, in order")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    report = gather(arguments.evaluation, arguments.runs)
    try:
        from eval.report_page import render
    except ModuleNotFoundError as error:
        raise ValueError(f"the report needs {error.name}: pip install 'defocus-mllm[quickstart]'") from error
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(arguments.output, render(report))
    print(f"report: {arguments.output}")


if __name__ == "__main__":
    run_script(main)
