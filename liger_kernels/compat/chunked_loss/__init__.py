"""The losses under the names of liger_kernel.chunked_loss, from hidden states and a head's weight.

Log-probabilities and divergences are ops, which hold one chunk of logits; the rest is plain torch
on a number a token or an answer. `compiled` and `chunk_size` choose how liger_kernel computes, not
what: they are taken and change nothing. What a loss returns beside itself has no gradient.
"""
