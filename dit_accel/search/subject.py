"""What is searched: a model on one shape and schedule, and a batch of prompts.

The pipeline runs up to its first call of a denoiser: that tells the grid, the text and the noise levels.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel import compat
from dit_accel.bricks import Grid
from dit_accel.compare import Job
from dit_accel.errors import BadUsage, RecipeError, nearest
from dit_accel.families.base import Family
from dit_accel.inventory import describe
from dit_accel.loading import Model
from dit_accel.plan import Key
from dit_accel.search.calls import by_name
from dit_accel.search.trajectory import family_of_model
from dit_accel.sites import Denoiser, match_attention
from dit_accel.stages import stages
from dit_accel.timeline import FEW_STEPS


@dataclass(frozen=True)
class Subject:
    """A model on one shape and schedule, its layers, and a batch of prompts."""

    model: Model
    family: Family
    jobs: tuple[Job, ...]
    arguments: Mapping[str, Any]  # of the pipeline's call
    sites: tuple[str, ...]  # self-attention, "component.site", in forward order
    cross: tuple[str, ...]  # the cross-attention that goes with it
    grid: Grid
    text: int  # tokens of it in the self-attention, at the first call
    levels: tuple[float, ...]
    batch: int  # samples in one call of a denoiser, of a batched pair those of both branches
    item_bytes: int  # of one number of the latents
    device: torch.device

    @property
    def joint(self) -> bool:
        """Whether text shares the self-attention."""
        return "text" in self.family.token_order

    @property
    def made_for(self) -> dict[str, Any]:
        """The table of a recipe."""
        return {
            "family": self.family.name,
            "model": self.model.name,
            "grid": self.grid,
            "scheduler": type(self.model.pipe.scheduler).__name__,
        }

    @property
    def stored_rows(self) -> int:
        """Rows of one stored value on all branches: samples times tokens."""
        calls = 2 if self.family.guidance == "sequential" else 1
        return calls * self.batch * (math.prod(self.grid) + self.text)

    def layers(self) -> list[Key]:
        """Every self-attention that is searched."""
        return [_key(name) for name in self.sites]

    def cross_attention(self) -> list[Key]:
        """The cross-attention beside it."""
        return [_key(name) for name in self.cross]

    def all_attention(self) -> list[Key]:
        """Every attention that is searched, the cross-attention last."""
        return self.layers() + self.cross_attention()

    def attention(self, key: Key) -> Any:
        """The attention module of a layer."""
        return denoisers_of(self.model)[key[0]].get_submodule(key[1])

    def width(self, key: Key) -> int:
        """Numbers in a token's output of all heads of a layer."""
        return self.attention(key).to_out[0].weight.shape[0]

    def as_fields(self) -> dict[str, Any]:
        """The fields by name, for a search on this subject."""
        return {each.name: getattr(self, each.name) for each in fields(Subject)}


class _Seen(Exception):
    """Leaves the pipeline at its first call of a denoiser."""


def look(
    model: Model, jobs: Sequence[Job], arguments: Mapping[str, Any], sites: Sequence[str] = ()
) -> Subject:
    """The subject of a search; the pipeline runs up to its first call of a denoiser.

    Raises BadUsage where there is nothing to search: an unknown family, too few steps, or sites without
    self-attention.
    """
    family = family_of_model(model)
    chosen, cross = _chosen_sites(model, family, sites)
    inputs, levels = _first_inputs(model, jobs, arguments)
    if len(levels) <= FEW_STEPS:
        raise BadUsage(
            f"asked to search over {len(levels)} steps; at {FEW_STEPS} or fewer neither outputs nor windows "
            f"of an earlier step are used. Give --steps {FEW_STEPS + 1} or more."
        )
    grid = family.grid(denoisers_of(model)["transformer"].config, inputs)
    text = inputs.get("encoder_hidden_states")
    joint = "text" in family.token_order
    rows = text.shape[1] if joint and isinstance(text, Tensor) else 0
    latents = inputs["hidden_states"]
    return Subject(
        model, family, tuple(jobs), arguments, chosen, cross, grid, rows, levels,
        latents.shape[0], latents.element_size(), latents.device,
    )  # fmt: skip


def check_memory(subject: Subject, needed: int, memory_gb: float | None) -> None:
    """Raise BadUsage where a search would keep more bytes than are free, or than `memory_gb` allows."""
    free = _free_bytes(subject.device)
    asked = math.inf if memory_gb is None else memory_gb * 2**30
    if needed <= min(asked, free):
        return
    found = f"--memory-gb allows {asked / 2**20:.1f}" if asked <= free else f"{free / 2**20:.1f} are free"
    raise BadUsage(
        f"asked to search {len(subject.sites)} layers on {len(subject.jobs)} prompts of {subject.grid} "
        f"tokens; their caches need {needed / 2**20:.1f} MiB and {found}. "
        "Take fewer prompts (--num-prompts), fewer sites (--sites) or a smaller size."
    )


def call_of(jobs: Sequence[Job], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """One call of the pipeline for all prompts, each with its own seed."""
    given = dict(arguments)
    if isinstance(given.get("negative_prompt"), str):
        given["negative_prompt"] = [given["negative_prompt"]] * len(jobs)
    noise = [torch.Generator("cpu").manual_seed(job.seed) for job in jobs]
    return given | {"prompt": [job.prompt for job in jobs], "generator": noise}


def denoisers_of(model: Model) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by their names on it."""
    found = {name: getattr(model.pipe, name, None) for name in ("transformer", "transformer_2")}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def _key(name: str) -> Key:
    component, _, site = name.partition(".")
    return component, site


def _chosen_sites(
    model: Model, family: Family, patterns: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The self-attention and the cross-attention that patterns name; all where there is no pattern."""
    denoisers = [describe(name, module, family) for name, module in denoisers_of(model).items()]
    own = [f"{one.component}.{site}" for one in denoisers for site in one.self_attention]
    cross = [f"{one.component}.{site}" for one in denoisers for site in one.cross_attention]
    if not patterns:
        return tuple(own), tuple(cross)
    named = {f"{one.component}.{site}" for p in patterns for one in denoisers for site in _named(p, one)}
    for pattern in patterns:
        if not any(site in one.self_attention for one in denoisers for site in _named(pattern, one)):
            known = [site for one in denoisers for site in one.self_attention]
            raise BadUsage(
                f'asked to search the site "{pattern}"; it has no self-attention here; nearest: '
                f"{nearest(pattern, known)}. Give a path; its block may be * or a range."
            )
    return tuple(site for site in own if site in named), tuple(site for site in cross if site in named)


def _named(pattern: str, denoiser: Denoiser) -> list[str]:
    try:
        return match_attention(pattern, denoiser)
    except RecipeError:
        return []


def _first_inputs(
    model: Model, jobs: Sequence[Job], arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[float, ...]]:
    """The arguments of the first call of a denoiser, and the noise levels of its schedule."""
    seen: dict[str, Any] = {}

    def leave(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.update(by_name(module, args, kwargs))
        raise _Seen

    hooks = [
        module.register_forward_pre_hook(leave, prepend=True, with_kwargs=True)
        for module in denoisers_of(model).values()
    ]
    try:
        with stages(model.pipe):
            model.pipe(**call_of(jobs, arguments), output_type="latent")
    except _Seen:
        pass
    except ValueError as error:
        raise BadUsage(
            f"asked to search with {dict(arguments)}; {type(model.pipe).__name__} refused: {error} "
            "Change the argument it names."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    scheduler = model.pipe.scheduler
    return seen, compat.noise_levels(scheduler, scheduler.timesteps)


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        return math.inf
