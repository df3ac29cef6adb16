"""Losses on the log-probabilities of answers, in plain torch: nothing here computes logits."""
