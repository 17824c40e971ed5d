"""Which errors mean that PyTorch cannot batch an operation, so that a loop is the answer.

Any other error is the caller's to see.
"""

from __future__ import annotations

# What torch says of operations without a batching rule: data-dependent control flow, .item(),
# random draws, in-place writes, a user's autograd.Function, and fallbacks that do not exist.  It
# has no class of its own for them.
_WORDS = (
    "vmap",
    "functorch",
    "batching rule",
    "batchedtensor",
    "doesn't have storage",
    "match the broadcast shape",
)


def cannot_be_batched(error: BaseException) -> bool:
    """Whether `error` says that an operation has no batching rule.

    Else something is wrong with it or with memory.

    >>> cannot_be_batched(RuntimeError("vmap: It looks like you're calling .item() on a Tensor."))
    True
    >>> cannot_be_batched(RuntimeError("The size of tensor a (3) must match that of tensor b (4)"))
    False
    """
    text = str(error).lower()
    return isinstance(error, (RuntimeError, NotImplementedError)) and any(
        word in text for word in _WORDS
    )
