"""Where others' evaluation harnesses meet ours: models for them, and our benchmarks as their tasks."""
