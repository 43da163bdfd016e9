"""One file per benchmark: where its official files lie, its prompt, its scoring rule. Listed in `eval/registry.py`."""
