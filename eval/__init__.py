"""Benchmarks, official metrics, statistics and reports. `python -m eval.run --list` shows what can be measured."""
