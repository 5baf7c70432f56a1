"""Two attentions over disjoint sets of keys, as one."""

import torch
from torch import Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of a and b together; `out` `[..., D]`, `lse` `[...]`, natural log.

    Exact when a and b share no key. A side with lse = -inf (no key) weighs nothing, whatever its `out` is
    as long as it is finite; two such sides give zeros and -inf.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    top = lse.masked_fill(lse == float("-inf"), 0.0)
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    out = out_a * weight_a[..., None].to(out_a.dtype) + out_b * weight_b[..., None].to(out_b.dtype)
    return out, lse
