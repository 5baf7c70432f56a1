"""DiTFastAttnV2's search in plain PyTorch: its menu by hand inside `F.scaled_dot_product_attention`.

Nothing of dit_accel runs here. Masks are dense, errors are those of the formulas, and the program of a layer
is solved by trying every combination of its heads.
"""

import contextlib
import functools
from itertools import product

import torch
import torch.nn.functional as F


class HeadReplay:
    """One pipeline whose layers decide for themselves, head by head, what they may save.

    `masks` are bool [V, V] by letter, `gains` the work they save by letter; "r" is the last output.
    """

    def __init__(self, modules, batched, masks, gains, delta, projected):
        self.modules, self.batched, self.masks, self.gains = modules, batched, masks, gains
        self.delta, self.projected = delta, projected
        self.at, self.calls = None, {}
        self.last, self.picks, self.errors = {}, {}, {}

    def attention(self, query, key, value, attn_mask=None, **rest):
        if self.at is None:
            return self.sdpa(query, key, value, attn_mask=attn_mask, **rest)
        number, call = self.at, self.calls.get(self.at, 0)
        self.calls[number] = call + 1
        if not self.batched:  # cond and uncond take turns
            return self.layer((number, ("cond", "uncond")[call % 2]), query, key, value)
        halves = [x.chunk(2) for x in (query, key, value)]
        cond = self.layer((number, "cond"), *(half[1] for half in halves))
        return torch.cat([self.layer((number, "uncond"), *(half[0] for half in halves)), cond])

    def layer(self, place, query, key, value):
        y = self.sdpa(query, key, value)  # [B, H, N, D]
        row = self.picks.setdefault(place, [])
        if not row:
            row.append("F" * y.shape[1])
            self.last[place] = y
            return y
        others = {"r": self.last[place]}
        for letter, mask in self.masks.items():
            text = y.shape[2] - len(mask)
            whole = torch.ones(y.shape[2], y.shape[2], dtype=torch.bool)
            whole[text:, text:] = mask  # text stands first
            others[letter] = self.sdpa(query, key, value, attn_mask=whole)
        errors = {letter: self.error(place[0], y, other) for letter, other in others.items()}
        row.append(self.best(errors))
        self.errors.setdefault(place, []).append(errors)
        out = torch.stack([others.get(x, y)[:, h] for h, x in enumerate(row[-1])], dim=1)
        self.last[place] = out
        return out

    def error(self, number, y, other):
        off, own = (other - y).double(), y.double()
        if not self.projected:
            spread = own - own.mean((0, 2, 3), keepdim=True)
            return (off.square().sum((0, 2, 3)) / spread.square().sum((0, 2, 3))).tolist()
        weight = self.modules[number].to_out[0].weight.double()
        size = F.linear(own.transpose(1, 2).flatten(2), weight).square().sum()
        parts = weight.chunk(y.shape[1], dim=1)
        return [float(F.linear(off[:, h], part).square().sum() / size) for h, part in enumerate(parts)]

    def best(self, errors):
        heads = len(next(iter(errors.values())))
        found = 0.0, 0.0, "F" * heads
        for letters in product("F" + "".join(errors), repeat=heads):
            own = [errors[x][h] for h, x in enumerate(letters) if x != "F"]
            gain = sum(self.gains[x] for x in letters if x != "F")
            if any(error >= 1.5 * self.delta / heads for error in own) or sum(own) > self.delta:
                continue
            if gain > found[0] + 1e-9 or (gain > found[0] - 1e-9 and sum(own) < found[1]):
                found = gain, sum(own), "".join(letters)
        return found[2]

    def inside(self, number, own, *args, **kwargs):
        self.at = number
        try:
            return own(*args, **kwargs)
        finally:
            self.at = None

    @contextlib.contextmanager
    def installed(self):
        self.sdpa = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = self.attention
        for number, module in enumerate(self.modules):
            module.forward = functools.partial(self.inside, number, module.forward)
        try:
            yield self
        finally:
            F.scaled_dot_product_attention = self.sdpa
            for module in self.modules:
                del module.forward
