"""Training of De-focus MLLMs: data, stages 0 to 2 and the loop they share."""
