"""Adapters by which other evaluation harnesses run our checkpoints, without a fork of them."""
