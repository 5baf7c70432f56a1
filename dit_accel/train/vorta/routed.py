"""A frozen denoiser whose self-attention is served by a method of ours, outside of any pipeline call.

The model's own processors run, with norm, rotation and projections; only their attention call is led to
`serve`. That is what `dit_accel.accelerate` does too, but there a schedule says which step it is.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit_accel.bricks import Grid
from dit_accel.errors import BadUsage
from dit_accel.families.base import Family
from dit_accel.inventory import describe
from dit_accel.loading import Model
from dit_accel.plan import Key
from dit_accel.proxy import KEY_ATTRIBUTE, Installed, Proxy, make_proxy
from dit_accel.recipe import Recipe
from dit_accel.session import Forward, Session
from dit_accel.timeline import ALONE, BRANCHES, Entry, Track
from dit_accel.train.recompute import recompute_blocks
from dit_accel.visit import AttentionVisit

Serve = Callable[[str, AttentionVisit], Tensor]  # (site, visit) -> [B, N, h, D]


@dataclass(frozen=True)
class _Served:
    """All heads of one site."""

    site: str
    owner: "Routed"

    computes: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = True

    def attend(self, visit: AttentionVisit) -> Tensor:
        serve = self.owner.serve
        return visit.dense() if serve is None else serve(self.site, visit)


class Routed(Session):
    """The denoiser `transformer` of a model; without `serve` it is as it was."""

    def __init__(self, model: Model, family: Family):
        self.module: nn.Module = model.pipe.transformer
        self.family = family
        record = describe("transformer", self.module, family)
        super().__init__(Recipe.neutral(), {"transformer": (record, family)}, model.pipe, strict=True)
        self.record = record
        self.serve: Serve | None = None
        self._tracks = {site: self._track(site, heads) for site, heads in record.self_attention.items()}

    def _track(self, site: str, heads: int) -> Track:
        entry = Entry(ALONE * heads, ((_Served(site, self), tuple(range(heads))),), {})
        return Track(dict.fromkeys(BRANCHES, (entry,)), 0)

    def track(self, seam: str, key: Key) -> Track | None:
        """What a site does: it is served, as long as somebody serves."""
        return self._tracks.get(key[1]) if seam == "attention" and self.serve is not None else None

    def count(self, *_: Any, **__: Any) -> None:
        """There is no report of a training."""

    @contextlib.contextmanager
    def recomputed(self, wanted: bool) -> Iterator[None]:
        """Where `wanted`, blocks keep no activations while the block of `with` runs."""
        switch_off = recompute_blocks(self.module) if wanted else None
        try:
            yield
        finally:
            if switch_off is not None:
                switch_off()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Frozen, and its attention calls led here, while the block of `with` runs."""
        installed, proxies = Installed(self), {}
        before: list[tuple[Any, Any]] = []
        wanted = [parameter.requires_grad for parameter in self.module.parameters()]
        self.module.requires_grad_(False)
        try:
            for site in self.record.self_attention:
                attention: Any = self.module.get_submodule(site)
                processor = attention.processor
                if isinstance(processor, Proxy | nn.Module):
                    raise BadUsage(
                        f"asked to train routers; {site} is served by {type(processor).__name__}, which "
                        "cannot be led elsewhere. Restore what accelerates it, or use diffusers' processors."
                    )
                if type(processor) not in proxies:
                    proxies[type(processor)] = make_proxy(processor)
                before.append((attention, processor))
                attention.processor = proxies[type(processor)]
                attention.__dict__[KEY_ATTRIBUTE] = installed.key_of("transformer", site)
            yield
        finally:
            for attention, processor in before:
                attention.processor = processor
                attention.__dict__.pop(KEY_ATTRIBUTE, None)
            for parameter, want in zip(self.module.parameters(), wanted, strict=True):
                parameter.requires_grad_(want)

    def forward(
        self, arguments: dict[str, Any], serve: Serve | None = None, brick: Grid | None = None
    ) -> Tensor:
        """The denoiser's output for one sample of one branch, its attention served by `serve`.

        With `brick` visits say that tokens stand in its order: for timings, whatever the values. What serves
        stays in place, so that a backward may compute activations again.
        """
        config, family = self.module.config, self.family
        self.serve, self.scratch = serve, {}
        self.at = Forward(
            component="transformer", step=0, branch="cond",
            grid=family.grid(config, arguments), references=family.references(config, arguments),
            text_first=family.token_order.startswith("text"), joint="text" in family.token_order,
            batch=arguments["hidden_states"].shape[0], brick=brick,
        )  # fmt: skip
        output = self.module(**arguments)
        return output[0] if isinstance(output, tuple) else output.sample

    def embedding(self, arguments: dict[str, Any]) -> Tensor:
        """The embedded timestep [1, E] of a forward with these arguments, which goes no further.

        Raises BadUsage where the timestep is not embedded once for the sample.
        """

        class Embedded(Exception):
            pass

        found: list[Tensor] = []

        def leave(module: nn.Module, args: Any, output: Tensor) -> None:
            found.append(output.detach())
            raise Embedded

        hook = time_embedder_of(self.module, self.family).register_forward_hook(leave)
        try:
            with torch.no_grad(), contextlib.suppress(Embedded):
                self.forward(arguments)
        finally:
            hook.remove()
        if not found or found[0].shape[:-1] != (1,):
            shape = tuple(found[0].shape) if found else "nothing"
            raise BadUsage(
                f"asked for routers, which see one embedded timestep [1, E]; "
                f"{self.family.time_embedder} gave {shape}. Use --method ditfastattn."
            )
        return found[0]


def time_embedder_of(module: nn.Module, family: Family) -> nn.Module:
    """The submodule that embeds the timestep; BadUsage where the family names none."""
    if not family.time_embedder:
        raise BadUsage(
            f"asked for routers of family {family.name}; its record does not say where the timestep is "
            "embedded. Give it a time_embedder."
        )
    return module.get_submodule(family.time_embedder)
