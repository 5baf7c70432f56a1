"""A diffusers pipeline from a folder, a toy's name or a Hub id, with what is known of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from dit_accel.errors import BadUsage, DitAccelError, RecipeError
from dit_accel.families import Family, family_of
from dit_accel.recipe_names import resolve_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# diffusers' own examples load these VAEs in float32: their decoders lose detail in bfloat16
FLOAT32_VAES = ("AutoencoderKLWan",)


@dataclass(frozen=True)
class Place:
    """Where and how a pipeline is loaded."""

    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1"...
    dtype: str = "auto"  # a key of DTYPES, or "auto": the folder's own, else bfloat16 on an accelerator
    offload: bool = False  # modules wait in host memory and visit the device one by one


@dataclass(frozen=True)
class Model:
    """A loaded pipeline and the facts that come with it."""

    name: str  # as the user wrote it
    pipe: Any
    family: Family | None  # None: unknown, runs dense
    defaults: Mapping[str, Any]  # the folder's generation.json
    toy: bool  # shipped with the package: its numbers never stand for real weights

    @property
    def output(self) -> str | None:
        """ "video", "image", or None where only a run can tell."""
        return self.family.output if self.family else None

    @property
    def draws_scenes(self) -> bool:
        """Whether it was trained on `dit_accel.scenes`, so that prompts must be captions of that language."""
        return self.defaults.get("captions", "scenes" if self.toy else None) == "scenes"

    @property
    def fps(self) -> int:
        """Frames per second for saving."""
        return int(self.defaults.get("fps") or (self.family.fps if self.family else 16))


def load(name: str, place: Place = Place()) -> Model:
    """Load a pipeline with its device, dtype and offloading arranged."""
    try:
        where = resolve_model(name)
    except RecipeError as error:
        raise BadUsage(str(error)) from error
    folder = local_folder(name, where)
    defaults = _generation_defaults(folder)
    device = pick_device(place.device)
    dtype = pick_dtype(place.dtype, device, defaults)
    pipe = _from_pretrained(name, where, dtype)
    if place.offload and device.type != "cpu":
        pipe.enable_model_cpu_offload(device=device)
    else:  # on a CPU the modules already are where offloading would put them
        pipe.to(device)
    denoiser = getattr(pipe, "transformer", None) or getattr(pipe, "transformer_2", None)
    return Model(name, pipe, family_of(denoiser), defaults, toy=where != name)


def local_folder(name: str, where: str) -> Path | None:
    """The folder of a model on this machine; None for a Hub id."""
    folder = Path(where).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise BadUsage(
                f"asked for the model in {folder}; the folder has no model_index.json. "
                "Give the folder of a whole diffusers pipeline, as save_pretrained writes it."
            )
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise BadUsage(
            f'asked for the model "{name}"; no such folder is here. Give a folder with a diffusers pipeline, '
            'a toy such as "toys/wan", or a Hub id such as "Wan-AI/Wan2.1-T2V-1.3B-Diffusers".'
        )
    return None


def pick_device(asked: str) -> torch.device:
    """The device asked for, or the accelerator if there is one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if asked == "auto":
        return found or torch.device("cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise BadUsage(
            f'asked for the device "{asked}"; torch knows no such device. Give cpu or cuda.'
        ) from error
    count = torch.accelerator.device_count() if found else 0
    if device.type != "cpu" and (found is None or found.type != device.type or (device.index or 0) >= count):
        has = f"{count} of type {found.type}" if found else "no accelerator"
        raise BadUsage(
            f'asked for the device "{asked}"; torch {torch.__version__} finds {has}. Give --device cpu.'
        )
    return device


def pick_dtype(asked: str, device: torch.device, defaults: Mapping[str, Any]) -> torch.dtype:
    """The dtype asked for, else the folder's, else what is usual on the device."""
    name = str(defaults.get("dtype", "auto")) if asked == "auto" else asked
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise BadUsage(f'asked for the dtype "{name}"; known: {", ".join(DTYPES)}. Give one of them.')
    return DTYPES[name]


def stated_dtype(name: str) -> str | None:
    """The dtype that a model's own generation.json asks for, where it is on this machine and does."""
    dtype = _generation_defaults(local_folder(name, resolve_model(name))).get("dtype", "auto")
    return None if dtype == "auto" else str(dtype)


def _generation_defaults(folder: Path | None) -> Mapping[str, Any]:
    file = folder / "generation.json" if folder else None
    if file is None or not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise BadUsage(
            f"{file}: not a JSON object of call arguments ({error}). Repair or remove it."
        ) from error


def _from_pretrained(name: str, where: str, dtype: torch.dtype) -> Any:
    try:
        config = DiffusionPipeline.load_config(where)
        vae = config.get("vae", (None, None))[1] if isinstance(config, Mapping) else None
        dtypes = {"default": dtype, "vae": torch.float32} if vae in FLOAT32_VAES else dtype
        return DiffusionPipeline.from_pretrained(where, dtype=dtypes)
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        reason = str(error).strip().splitlines()[0]
        raise DitAccelError(
            f'asked for the model "{name}"; it could not be loaded: {reason} '
            "Give a folder, check the Hub id and the network, or log in with `hf auth login` if it is gated."
        ) from error
