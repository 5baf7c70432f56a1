"""DiTFastAttn in plain PyTorch: its menu by hand around a denoiser's modules, its greedy by full forwards.

Nothing of dit_accel runs here. A pick decides what an attention module does; the attention inside is caught
where it calls `F.scaled_dot_product_attention`. Every candidate is a forward of the whole denoiser.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F

STRONGEST_FIRST = ("R", "X", "W", "S")


class Replay:
    """One pipeline whose denoiser decides for itself, at every step, what its layers may save."""

    def __init__(self, pipe, blocks, batched, near, delta):
        self.module, self.batched, self.near, self.delta = pipe.transformer, batched, near, delta
        self.layers = [block.attn1 for block in self.module.get_submodule(blocks)]
        self.stored, self.picks, self.decided, self.losses = {}, "", [], []
        self.at = self.branch = None
        self.calls, self.waiting = {}, []

    # ---- the menu

    def attention(self, query, key, value, attn_mask=None, **rest):
        if self.at is None:
            return self.sdpa(query, key, value, attn_mask=attn_mask, **rest)
        near = self.sdpa(query, key, value, attn_mask=self.near)
        place = "residual", self.at, self.branch
        if self.picks[self.at] in "WX":
            return near + self.stored[place]
        full = self.sdpa(query, key, value)
        self.stored[place] = full - near
        return full

    def layer(self, number, own, hidden, *more, **rest):
        pick = self.picks[number]

        def run(branch, half):
            self.at, self.branch = number, branch
            try:
                return own(half, *more, **rest)
            finally:
                self.at = None

        def answer(branch, half):
            key = "out", number, branch
            if pick == "R":
                return self.stored[key]
            shares = pick in "SX" and branch == "uncond"
            self.stored[key] = self.stored["out", number, "cond"] if shares else run(branch, half)
            return self.stored[key]

        if not self.batched:
            return answer(self.now, hidden)
        uncond, cond = hidden.chunk(2)
        after = answer("cond", cond)
        return torch.cat([answer("uncond", uncond), after])

    def allowed(self, pick, layer):
        past = [row[layer] for row in self.decided]
        if pick != "W":
            return True
        since = past[len(past) - past[::-1].index("F") :]
        return not {"S", "X"} & set(since)

    # ---- the greedy

    def forward(self, picks, calls, keep=False):
        before = dict(self.stored)
        self.picks, out = picks, []
        for self.now, (args, kwargs) in calls.items():
            out.append(self.own(*args, **kwargs)[0])
        if not keep:
            self.stored = before
        return out

    def step(self, calls):
        count = len(self.layers)
        if not self.decided:
            self.decided, self.losses = ["F" * count], [[{}] * count]
            return self.forward("F" * count, calls, keep=True)
        a, row, losses = self.forward("F" * count, calls), "", []
        for i in range(count):
            chosen, tried = "F", {}
            for pick in STRONGEST_FIRST:
                if not self.allowed(pick, i):
                    continue
                b = self.forward(row + pick + "F" * (count - i - 1), calls)
                off = sum(float((x - y).double().square().sum()) for x, y in zip(a, b, strict=True))
                tried[pick] = off / sum(float(x.double().square().sum()) for x in a)
                if tried[pick] < self.delta * (i + 1) / count:
                    chosen = pick
                    break
            row += chosen
            losses.append(tried)
        self.decided.append(row)
        self.losses.append(losses)
        return self.forward(row, calls, keep=True)

    def take(self, *args, **kwargs):
        """A call of the pipeline. Of a pair the first is searched, with the texts of the first pair."""
        if self.batched:
            return (self.step({"both": (args, kwargs)})[0],)
        if self.waiting:
            return (self.waiting.pop(),)
        if self.calls and "text" not in self.calls:  # the second call of the first step
            self.calls["text"] = kwargs["encoder_hidden_states"]
            return (self.forward("F" * len(self.layers), {"uncond": (args, kwargs)}, keep=True)[0],)
        if not self.calls:
            self.calls["seen"] = True
            self.decided, self.losses = ["F" * len(self.layers)], [[{}] * len(self.layers)]
            return (self.forward("F" * len(self.layers), {"cond": (args, kwargs)}, keep=True)[0],)
        uncond = {**kwargs, "encoder_hidden_states": self.calls["text"]}
        cond, after = self.step({"cond": (args, kwargs), "uncond": (args, uncond)})
        self.waiting.append(after)
        return (cond,)

    @contextlib.contextmanager
    def installed(self):
        self.own, self.sdpa = self.module.forward, F.scaled_dot_product_attention
        owns = [layer.forward for layer in self.layers]
        self.module.forward = self.take
        F.scaled_dot_product_attention = self.attention
        for number, (layer, own) in enumerate(zip(self.layers, owns, strict=True)):
            layer.forward = functools.partial(self.layer, number, own)
        try:
            yield self
        finally:
            F.scaled_dot_product_attention = self.sdpa
            for module in (self.module, *self.layers):
                del module.forward
