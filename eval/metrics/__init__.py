"""Scoring rules as pure functions of (prediction, target)."""
