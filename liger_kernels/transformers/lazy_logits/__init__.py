"""Lazy logits: a model computes its loss, and the (tokens, vocabulary) matrix never exists.

While a patched model computes a loss, its head returns a placeholder that records the operations
models apply between head and loss. F.cross_entropy on it is one fused linear cross-entropy. Any
other use materializes the real logits, through the stock head and the recorded operations, so the
result is always that of the stock model: an unknown use costs memory, not correctness.

    model(labels=...)              head.py      decide whether this call is lazy
      lm_head(hidden)
        |
        v
      DeferredLogits               deferred.py  head, input, and one RecordedOp an operation
        | shown to the model as
        +-- LazyLogits             tensor.py    eager: a tensor without storage
        +-- a stub                 compiled.py  torch.compile: one NaN, expanded to the shape
        |
        | every torch function on it
        v
      respond()                    ops.py       record it, compute a loss, or need the values
        |            |         |
        v            v         v
      RecordedOp   loss.py   DeferredLogits.real(): materialize once, with the stock head
                     fused, chunked, or None (the real logits)

logprobs.py computes log-probabilities inside of the forward, for token_logprobs: its answer is in
the place of the logits. sharding.py gathers the weights of a head that FSDP2 shards; callers.py
reads the call stack; steps.py counts the steps of optimizers.

Invariants:
  When on   In a forward with labels or shift_labels while training with gradients enabled, or with
            skip_logits=True or token_logprobs. skip_logits=False always gives real logits.
  Result    In training out.logits is LazyLogits; after skip_logits=True, and under torch.compile,
            it is None.
  Values    Materialized at most once, and then they are the truth: later losses use the real
            tensor, which its reader may have changed in-place.
  State     Autocast and gradient mode are those of the head's call, not of the read.
  Errors    Reading raises RuntimeError once the logits would differ from those of the forward:
            after optimizer.step() or another write to the head's weights or input, after an adapter
            or dropout was switched, or after FSDP2 resharded the head with a module around it.
            With the cross_entropy op the loss has made them: they stay readable.
  Gradient  A loss computed without the logits brings them none: hooks and retain_grad on them warn.
  Compiled  Dynamo cannot trace a tensor without storage, so a torch function mode recognizes stubs
            by identity. It sees the public functions of torch; others give NaN. The mode does not
            check versions of weights, and labels are not counted on the host.
"""
