"""Attention maps of a dense run, small enough for a page: what a head looks at, and how much of it is near.

A probe stands where a method would: it sees q and k after norm and rotation, notes, and answers with the
model's own attention. Of `SIDE` evenly spaced visual queries the softmax over all keys is summed in as many
bins of visual keys in raster order, so that the whole matrix is never held.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dit_accel import api
from dit_accel.compare import Job
from dit_accel.generate import generate
from dit_accel.loading import Model
from dit_accel.plan import Plan
from dit_accel.recipe import Recipe
from dit_accel.timeline import BRANCHES, Entry, Track
from dit_accel.visit import AttentionVisit

SIDE = 64


@dataclass(frozen=True)
class Map:
    """What the heads of one layer look at, at one step, on the conditional branch."""

    site: str
    step: int
    weights: np.ndarray  # [H, SIDE, SIDE]: of a query's attention what falls into each bin of keys
    near: np.ndarray  # [H]: the share of it within 1/8 of the visual tokens on each side


@dataclass(frozen=True)
class Probe:
    """Notes a map and leaves the attention to the model."""

    note: Callable[[np.ndarray, np.ndarray], None]

    seams: ClassVar[frozenset[str]] = frozenset({"attention"})
    computes: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = False

    def attend(self, visit: AttentionVisit) -> Tensor:  # [B, N, h, D]
        self.note(*weights_of(visit))
        return visit.dense()


def weights_of(visit: AttentionVisit) -> tuple[np.ndarray, np.ndarray]:
    """Map [H, SIDE, SIDE] and near share [H] of the last sample: of a guided pair that is cond's."""
    # a dense run keeps the model's own order of tokens
    first = visit.num_text if visit.text_first else 0
    visual = visit.q.shape[1] - visit.num_text
    chosen = torch.linspace(0, visual - 1, min(SIDE, visual), device=visit.q.device).round().long()
    q = visit.q[-1, first + chosen].double()  # [S, H, D]
    scores = torch.einsum("shd,nhd->hsn", q, visit.k[-1].double())
    scores = scores * (visit.q.shape[-1] ** -0.5 if visit.scale is None else visit.scale)
    bias = visit.key_bias()
    if bias is not None:
        scores = scores + bias[-1][:, None]
    seen = scores.softmax(-1)[:, :, first : first + visual]  # [H, S, V]
    bins = (torch.arange(visual, device=seen.device) * len(chosen)) // visual
    pooled = seen.new_zeros(*seen.shape[:2], len(chosen)).index_add_(2, bins, seen)
    distance = (chosen[:, None] - torch.arange(visual, device=seen.device)[None]).abs()
    near = (seen * (distance <= visual // 8)).sum(-1).mean(-1) / seen.sum(-1).mean(-1)
    return pooled.float().cpu().numpy(), near.float().cpu().numpy()


def attention_maps(
    model: Model, job: Job, arguments: Mapping[str, Any], levels: Sequence[float], steps: Sequence[int],
    sites: Sequence[str],
) -> list[Map]:  # fmt: skip
    """Maps of some layers ("component.site") at some steps of one dense generation."""
    found: list[Map] = []

    def note(site: str, session: Any, weights: np.ndarray, near: np.ndarray) -> None:
        at = session.at
        if at.step in steps and at.branch != "uncond":
            found.append(Map(site, at.step, weights, near))

    with api.accelerated(model.pipe, Recipe.neutral()) as handle:
        tracks = {}
        for name in sites:
            component, _, site = name.partition(".")
            heads = handle.session.denoisers[component].self_attention[site]
            probe = Probe(functools.partial(note, site, handle.session))
            own, seen = (Entry("." * heads, ((method, tuple(range(heads))),), {}) for method in (None, probe))
            row = tuple(seen if step in steps else own for step in range(len(levels)))
            tracks[component, site] = Track(dict.fromkeys(BRANCHES, row), 0)
        # a session keeps a plan whose noise levels are those of the run that starts
        handle.session.plan = Plan(tracks, {}, {}, tuple(levels), {}, ())
        generate(model, job.prompt, arguments, job.seed)
    return found
