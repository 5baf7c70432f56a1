"""Keys and values of cross-attention, computed once per prompt, branch and run.

They depend on the text alone, which the loop passes unchanged: the same tensor object at the same version.
Outputs of the projections are kept in the session's memory and answer in their place, beneath whatever
processor calls them. Attention masks do not enter keys and values.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from dit_accel import compat
from dit_accel.exact import weights
from dit_accel.exact.stand_in import Answer
from dit_accel.memory import Address
from dit_accel.session import Forward, Session

PLAIN = ("to_k", "to_v", "norm_k", "add_k_proj", "add_v_proj", "norm_added_k")
FUSED = ("to_kv", "norm_k", "to_added_kv", "norm_added_k")
NORMS = {"norm_k": "to_k", "norm_added_k": "add_k_proj"}  # a norm -> the projection whose output it takes
IMAGE = ("add_k_proj", "add_v_proj", "to_added_kv")
Made = set[tuple[str, str, str]]  # site, projection, branch of the batch or of its half


class TextKV:
    """The stored keys and values of one denoiser."""

    def __init__(self, session: Session, component: str, root: nn.Module, arguments: tuple[str, ...]):
        self.session, self.component, self.root, self.arguments = session, component, root, arguments
        self.sites = {site: root.get_submodule(site) for site in session.denoisers[component].cross_attention}
        self._texts: dict[str, list[Any]] = {}  # branch -> what its keys and values were made of
        self._made: dict[str, Made] = {}

    def children(self) -> list[tuple[str, str, nn.Module]]:
        """(site, name, module) of all projections and norms that the processors call."""
        found: list[tuple[str, str, nn.Module]] = []
        for site, attention in self.sites.items():
            names = FUSED if getattr(attention, "fused_projections", False) else PLAIN
            present = ((name, getattr(attention, name, None)) for name in names)
            found += [(site, name, child) for name, child in present if isinstance(child, nn.Module)]
        return found

    def new_run(self) -> None:
        """Nothing is kept from one run to the next."""
        self._texts.clear()
        self._made.clear()

    def begin(self, at: Forward, inputs: Mapping[str, Any]) -> list[tuple[nn.Module, Answer]]:
        """Who answers for which projection in this forward."""
        texts = [value for name in self.arguments if isinstance(value := inputs.get(name), Tensor)]
        versions = [compat.version_of(text) for text in texts]
        if not texts or None in versions:
            self._stand_aside("the text is an inference tensor, which does not tell whether it was changed")
            return []
        children = self.children()
        known = [*texts, *versions, *weights.stamp(child for *_, child in children)]
        before = self._texts.get(at.branch)
        if before is None or not _same(before, known):
            if not self._admit(at.branch, self.bytes(inputs, children), first=before is None):
                return []
            self._texts[at.branch] = known  # holds the tensors: their identity is not given to others
            self._made[at.branch] = set()
        made = self._made[at.branch]
        return [(child, partial(self._answer, made, at.branch, site, name)) for site, name, child in children]

    def bytes(self, inputs: Mapping[str, Any], children: list[tuple[str, str, nn.Module]]) -> int:
        """What one branch stores."""
        tokens = [inputs.get(name) for name in self.arguments]
        sizes = [t.shape[0] * t.shape[1] * t.element_size() if isinstance(t, Tensor) else 0 for t in tokens]
        text, image = (*sizes, 0)[:2]
        return sum(
            (image if name in IMAGE else text) * child.weight.shape[0]  # pyright: ignore
            for _, name, child in children
            if name not in NORMS
        )

    def _admit(self, branch: str, needed: int, first: bool) -> bool:
        """Whether the recipe's bound leaves room; it does not where the other branch would go over it."""
        session, limit = self.session, self.session.recipe.memory_gb
        if not first:
            return True
        branches = 1 if branch == "both" else 2
        held = sum(session.predicted.values())
        if limit is not None and branches * needed + held * branches > limit * 2**30:
            self._stand_aside(
                f"[limits] memory_gb leaves no room for {branches * needed / 2**20:.1f} MiB beside the rest"
            )
            return False
        session.predicted[self.component, f"{branch}, text k/v"] = needed
        return True

    def _stand_aside(self, why: str) -> None:
        self.session.exact_reasons["text k/v"] = f"not stored: {why}"

    def _answer(
        self, made: Made, outer: str, site: str, name: str, forward: Any, *args: Any, **kwargs: Any
    ) -> Any:
        at = self.session.at
        if at is None or not self.session.active:
            return forward(*args, **kwargs)
        source = NORMS.get(name, name)
        address: Address = (self.component, site, at.branch, ("text", outer))
        slot = self.session.memory.recall(address, source)
        if slot is not None and (site, name, at.branch) in made:
            self.session.exact["text k/v served"] += 1
            return args[0] if name in NORMS else slot.tensors[0]
        out = forward(*args, **kwargs)
        if name in NORMS:
            # the normed key replaces the plain one where the processor norms it as it was projected
            keep = slot is not None and _alike(out, slot.tensors[0])
        else:
            keep = True
            self.session.exact["text k/v computed"] += 1
        if keep:
            self.session.memory.store(address, source, (out,), at.step, exact=True)
            made.add((site, name, at.branch))
        return out


def _same(before: list[Any], now: list[Any]) -> bool:
    return len(before) == len(now) and all(
        a is b if isinstance(a, Tensor) else a == b for a, b in zip(before, now, strict=True)
    )


def _alike(out: Tensor, stored: Tensor) -> bool:
    return out.shape == stored.shape and out.dtype == stored.dtype and out.is_contiguous()
