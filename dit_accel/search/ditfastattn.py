"""DiTFastAttn as a search: one run of the pipeline on the calibration prompts gives one recipe for a delta.

Source: DiTFastAttn, Yuan et al. 2024, arXiv:2406.08552. The decisions are `greedy`'s; here is what is around
them: what the pipeline would get, checks that fail before it starts, and the recipe of what was decided.
"""

import functools
import inspect
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel import api, compat
from dit_accel.bricks import Grid
from dit_accel.compare import Job
from dit_accel.errors import BadUsage, RecipeError, nearest
from dit_accel.families.base import Family
from dit_accel.inventory import describe
from dit_accel.loading import Model
from dit_accel.recipe import Recipe
from dit_accel.search import menu
from dit_accel.search.greedy import Decisions, Ended, Greedy, TimeIsUp, searched_layers
from dit_accel.search.trajectory import family_of_model, guidance_of
from dit_accel.sites import Denoiser, match_attention
from dit_accel.stages import stages
from dit_accel.timeline import FEW_STEPS


@dataclass(frozen=True)
class Subject:
    """What is searched: a model on one shape and schedule, its layers, and a batch of prompts."""

    model: Model
    family: Family
    jobs: tuple[Job, ...]
    arguments: Mapping[str, Any]  # of the pipeline's call
    sites: tuple[str, ...]  # "component.site", in forward order
    grid: Grid
    text: int  # tokens of it in the self-attention
    levels: tuple[float, ...]
    near: str = "band"
    memory_gb: float | None = None  # [limits] of the recipe, and what the search itself may keep

    @property
    def near_set(self) -> dict[str, Any]:
        """Parameters of the windows."""
        return menu.near_set(self.near, self.grid)

    @property
    def made_for(self) -> dict[str, Any]:
        return {
            "family": self.family.name,
            "model": self.model.name,
            "grid": self.grid,
            "scheduler": type(self.model.pipe.scheduler).__name__,
        }


class _Seen(Exception):
    """Leaves the pipeline at its first call of a denoiser."""


def look(
    model: Model, jobs: Sequence[Job], arguments: Mapping[str, Any], sites: Sequence[str] = (),
    near: str = "band", memory_gb: float | None = None,
) -> Subject:  # fmt: skip
    """The subject of a search, checked; the pipeline runs up to its first call of a denoiser.

    Raises BadUsage where there is nothing to search: an unknown family, no guidance, too few steps, sites
    without self-attention, or too little memory for what a search keeps.
    """
    family = family_of_model(model)
    guidance_of(model, family, arguments)
    if near not in menu.NEARS:
        raise BadUsage(f'asked for the near set "{near}"; known: {", ".join(menu.NEARS)}. Give one of them.')
    chosen = _chosen_sites(model, family, sites)
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
    subject = Subject(model, family, tuple(jobs), arguments, chosen, grid, rows, levels, near, memory_gb)
    _check_memory(subject, inputs["hidden_states"])
    return subject


def search(
    subject: Subject, delta: float, decisions: Decisions, ended: Ended, saved: Callable[[], None],
    told: Callable[[int, int], None],
) -> Recipe:  # fmt: skip
    """Decide what `decisions` leaves open, and give the recipe. Ends early, all else full, when `ended`.

    `saved` is called after every decision, `told(done, total)` as well, in decisions.
    """
    if not decisions.finished:
        began = time.perf_counter() - decisions.seconds

        def keep() -> None:
            decisions.seconds = time.perf_counter() - began
            saved()

        try:
            _run(subject, delta, decisions, ended, keep, told)
            decisions.finished = True
        except TimeIsUp:
            pass
        keep()
    return recipe_of(subject, decisions)


def _run(
    subject: Subject, delta: float, decisions: Decisions, ended: Ended, saved: Callable[[], None],
    told: Callable[[int, int], None],
) -> None:  # fmt: skip
    pipe, steps = subject.model.pipe, len(subject.levels)
    layers = len(subject.sites) // len(denoisers_of(subject.model))
    with api.accelerated(pipe, _installed(subject), strict=True) as handle:
        greedy = Greedy(
            handle.session,
            denoisers_of(subject.model),
            searched_layers(handle.session, subject.sites),
            subject.near_set,
            delta,
            decisions,
            ended,
            saved,
            lambda step, layer: told(step * layers + layer, steps * layers),
        )
        with greedy.forwards.watching(), stages(pipe):
            pipe(**call_of(subject.jobs, subject.arguments), output_type="latent")


def recipe_of(subject: Subject, decisions: Decisions) -> Recipe:
    """The recipe of what is decided; what is not stays full."""
    joint = "text" in subject.family.token_order
    rows, layer = {}, dict.fromkeys(denoisers_of(subject.model), 0)
    for name in subject.sites:
        component, _, site = name.partition(".")
        history = decisions.history(component, layer[component], len(subject.levels))
        rows[component, site] = menu.rows_of(history, joint)
        layer[component] += 1
    return menu.recipe_of(
        rows, subject.levels, subject.near_set, subject.made_for, memory_gb=subject.memory_gb
    )


def _installed(subject: Subject) -> Recipe:
    """What the first step runs: everything full, and all that a second step may read is kept."""
    joint = "text" in subject.family.token_order
    rows = menu.rows_of(menu.FULL, joint, storing=True) + menu.future(joint, windows=True, shared=False)
    rows += menu.idle(len(subject.levels) - len(rows.cond))
    sites: list[tuple[str, str]] = []
    for name in subject.sites:
        component, _, site = name.partition(".")
        sites.append((component, site))
    return menu.recipe_of(dict.fromkeys(sites, rows), subject.levels, subject.near_set, subject.made_for)


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


def _chosen_sites(model: Model, family: Family, patterns: Sequence[str]) -> tuple[str, ...]:
    denoisers = [describe(name, module, family) for name, module in denoisers_of(model).items()]
    if not patterns:
        return tuple(f"{one.component}.{site}" for one in denoisers for site in one.self_attention)
    named = {f"{one.component}.{site}" for p in patterns for one in denoisers for site in _named(p, one)}
    for pattern in patterns:
        if not any(site in one.self_attention for one in denoisers for site in _named(pattern, one)):
            known = [site for one in denoisers for site in one.self_attention]
            raise BadUsage(
                f'asked to search the site "{pattern}"; it has no self-attention here; nearest: '
                f"{nearest(pattern, known)}. Give a path; its block may be * or a range."
            )
    ordered = [f"{one.component}.{site}" for one in denoisers for site in one.self_attention]
    return tuple(site for site in ordered if site in named)


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

    def leave(names: list[str], module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.update({**dict(zip(names, args, strict=False)), **kwargs})
        raise _Seen

    hooks = []
    for module in denoisers_of(model).values():
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        hooks.append(
            module.register_forward_pre_hook(functools.partial(leave, names), prepend=True, with_kwargs=True)
        )
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


def stored_bytes(subject: Subject, latents: Tensor) -> int:
    """What a search keeps at most: an output and a residual of every layer and branch."""
    branches = 2 if subject.family.guidance == "sequential" else 1
    rows = math.prod(subject.grid) + subject.text
    width = 0
    for name in subject.sites:
        component, _, site = name.partition(".")
        attention = denoisers_of(subject.model)[component].get_submodule(site)
        width += attention.to_out[0].weight.shape[0]  # pyright: ignore
    return 2 * branches * latents.shape[0] * rows * width * latents.element_size()


def _check_memory(subject: Subject, latents: Tensor) -> None:
    needed, free = stored_bytes(subject, latents), _free_bytes(latents.device)
    asked = math.inf if subject.memory_gb is None else subject.memory_gb * 2**30
    if needed <= min(asked, free):
        return
    found = f"--memory-gb allows {asked / 2**20:.1f}" if asked <= free else f"{free / 2**20:.1f} are free"
    raise BadUsage(
        f"asked to search {len(subject.sites)} layers on {len(subject.jobs)} prompts of {subject.grid} "
        f"tokens; their caches need {needed / 2**20:.1f} MiB and {found}. "
        "Take fewer prompts (--num-prompts), fewer sites (--sites) or a smaller size."
    )


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        return math.inf
