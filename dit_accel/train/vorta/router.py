"""The routers: for each layer one linear map from the embedded timestep to the scores of three branches.

Source: VORTA, Sun et al. 2025, arXiv:2505.18809: softmax_3(Linear_{E -> 3H}(SiLU(t_emb))) for each layer, in
PyTorch's default initialisation. They see the noise level and nothing else, so a trained router is a table.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from dit_accel.errors import BadUsage

BRANCHES = 3  # full, coreset, tile
FORMAT = "dit_accel vorta routers"


class Routers(nn.Module):
    """`sites` are self-attention sites and their heads, `width` is that of the embedded timestep."""

    def __init__(self, sites: Mapping[str, int], width: int, seed: int = 0):
        super().__init__()
        self.sites, self.width = dict(sites), width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.linears = nn.ModuleList(nn.Linear(width, BRANCHES * heads) for heads in sites.values())

    def forward(self, embedding: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
        """Scores [B, H, 3] of each site, which sum to 1; `embedding` is [B, E]."""
        active = functional.silu(embedding.float())
        return {
            site: (linear(active).unflatten(1, (heads, BRANCHES)) / temperature).softmax(-1)
            for (site, heads), linear in zip(self.sites.items(), self.linears, strict=True)
        }


def save_routers(file: Path, routers: Routers, told: Mapping[str, Any]) -> None:
    """Writes "SITE.weight" [3 H, E] and "SITE.bias" [3 H] in half precision; `told` becomes metadata."""
    tensors = {
        f"{site}.{name}": value.detach().half().cpu().contiguous()
        for site, linear in zip(routers.sites, routers.linears, strict=True)
        for name, value in linear.named_parameters()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"format": FORMAT, "told": json.dumps(dict(told))})
    temporary.replace(file)


def load_routers(file: Path, sites: Mapping[str, int], width: int, told: Mapping[str, Any]) -> Routers:
    """The routers of a file that `save_routers` wrote.

    Raises BadUsage where it is no such file, where its layers or shapes are not those of the model, and
    where they were trained for other branches than `told` says.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no dict
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise BadUsage(
            f"asked to use the routers in {file}; it cannot be read as safetensors ({error}). Give another."
        ) from error
    routers = Routers(sites, width)
    wanted = {
        f"{site}.{name}": tuple(value.shape)
        for site, linear in zip(sites, routers.linears, strict=True)
        for name, value in linear.named_parameters()
    }
    _check(file, wanted, {name: tuple(value.shape) for name, value in tensors.items()})
    trained = json.loads(metadata["told"]) if metadata.get("format") == FORMAT else {}
    for key in told:
        if key in trained and trained[key] != json.loads(json.dumps(told[key])):
            raise BadUsage(
                f"asked to use the routers in {file} with {key} {told[key]}; they were trained with "
                f"{trained[key]}. Ask for that, or train others."
            )
    with torch.no_grad():
        for site, linear in zip(sites, routers.linears, strict=True):
            for name, value in linear.named_parameters():
                value.copy_(tensors[f"{site}.{name}"])
    return routers


def _check(file: Path, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if odd:
        name = odd[0]
        raise BadUsage(
            f"asked to use the routers in {file}; {len(odd)} of its tensors do not fit: {name} is "
            f"{found.get(name, 'absent')} there and {wanted.get(name, 'absent')} for this model. "
            "Give the routers of this model, or train some."
        )
