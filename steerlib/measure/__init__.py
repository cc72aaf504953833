"""Numbers: log-probabilities, answers, probes, the lens, and their statistics."""
