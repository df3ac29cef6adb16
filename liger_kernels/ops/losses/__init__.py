"""The losses: cross entropy of given logits, and of a linear layer whose logits never all exist.

To understand the fused loss, read three files in this order:

    ../fused_linear_cross_entropy.py   formula, options, rounding, and the public functions
    linear_loss.py                     the loop over chunks of tokens: logits, loss, gradients
    row_loss_kernel.py                 the kernel: loss and gradient of one row of logits

The others answer one question each:

    autograd.py           when are gradients computed: in forward, in backward, in compiled code?
    grads_in_forward.py   how does backward scale gradients that forward computed?
    chunk_size.py         how many tokens has a chunk, and in which dtype do gradients add up?
    label_count.py        which tokens have a label, and how does the host know without blocking?
    row_loss.py           how is the kernel launched?
    row_gradient.py       how is the gradient computed from what forward kept of a row?
    row_loss_torch.py     what runs without Triton?
    linear_divergence.py, divergence_rows.py    the same two levels, of a student and a teacher
    options.py            which options do losses take, and which values are allowed?
"""
