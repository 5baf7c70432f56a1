"""What dit_accel knows of one model family: a record of names and two small functions, no code of a model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Grid = tuple[int, int, int]  # visual tokens: frames, rows, columns
Config = Any  # a denoiser's diffusers config: read by attribute
Inputs = Mapping[str, Any]  # a denoiser's forward arguments by name


def no_references(config: Config, inputs: Inputs) -> int:
    """Most models attend to their own target only."""
    return 0


@dataclass(frozen=True)
class Place:
    """A submodule whose output runs along the visual tokens, and is put in another order there."""

    module: str
    axis: int  # of the tokens; text may stand before them
    items: tuple[int, ...] | None = None  # of an output that is a tuple; None is every tensor
    spread: bool = False  # the tokens lie on three axes from `axis` on: frames, rows, columns
    back: bool = False  # from here on they stand in the model's own order again


@dataclass(frozen=True)
class Modulation:
    """Projections of a denoiser that depend on the timestep and a few more arguments, never on latents.

    `vectors(denoiser, inputs)` gives what reaches each projection, by its name in `projections`, for forward
    arguments by name; it calls the denoiser's own embedders, in the shapes of the denoiser's forward.
    """

    projections: tuple[str, ...]  # submodules; * stands for each index of a ModuleList
    embedders: tuple[str, ...]  # submodules whose weights enter the vectors; absent ones are left out
    arguments: tuple[str, ...]  # forward arguments that enter the vectors besides `timestep`
    vectors: Callable[[Any, Inputs], Mapping[str, Any]]


@dataclass(frozen=True)
class Family:
    """One model family. Names inside a block are those of diffusers, as `block.get_submodule` takes them."""

    name: str
    transformers: tuple[str, ...]  # class names of the denoisers this record describes
    blocks: tuple[str, ...]  # ModuleLists of the denoiser, in forward order
    self_attention: tuple[str, ...]  # attention over the visual tokens, and over text where it is joint
    cross_attention: tuple[str, ...]
    sublayers: tuple[str, ...]  # all children whose output is gated and added to a stream, in forward order
    streams: tuple[str, ...]  # block arguments that are residual streams
    returns: tuple[str, ...]  # the streams in the order in which a block returns them
    token_order: str  # what a self-attention sees: "visual", "text,visual" or "visual,text"
    guidance: str  # "sequential" (cond, then uncond) or "batched" (one batch, [uncond, cond])
    grid: Callable[[Config, Inputs], Grid]  # the target's visual tokens
    unbatched: tuple[str, ...]  # block arguments without a batch axis
    positions: (
        str  # submodule, or forward argument, that places tokens: what a frame-rate change must rewrite
    )
    frame_axis: int | None  # axis of the latent frames in the denoiser's `hidden_states`; None for images
    output: str  # "video" or "image"
    guidance_argument: str  # the guidance strength in the pipeline's `__call__`
    fps: int  # as diffusers' own examples export the family; 1 for images
    references: Callable[[Config, Inputs], int] = no_references  # visual tokens after the target's
    sublayer_tokens: Mapping[str, str] = field(default_factory=dict)  # "text" or "all" where not "visual"
    denoisers: tuple[str, ...] = ("transformer",)  # pipeline attributes that may hold such a denoiser
    # between the first and the last of these nothing asks where a token stands; (): the order is kept
    places: tuple[Place, ...] = ()
    placed_arguments: Mapping[str, int] = field(
        default_factory=dict
    )  # forward argument -> axis of the tokens
    raster_arguments: tuple[str, ...] = ()  # forward arguments that meet the tokens between blocks
    # submodule that embeds the timestep and nothing else: [B, E], before modulation; "": there is none
    time_embedder: str = ""
    modulation: Modulation | None = None  # None: no tables are made
    # forward arguments whose tokens become keys and values of the cross-attention, and nothing else does
    text_arguments: tuple[str, ...] = ("encoder_hidden_states",)

    def __post_init__(self) -> None:
        if sorted(self.returns) != sorted(self.streams):
            raise ValueError(
                f"family {self.name}: returns {self.returns} must name each of the streams {self.streams}"
            )
        if self.places and not any(place.back for place in self.places):
            raise ValueError(
                f"family {self.name}: none of its places {[place.module for place in self.places]} puts "
                f"the tokens back"
            )
        stray = set(self.self_attention + self.cross_attention) - set(self.sublayers)
        if stray:
            raise ValueError(
                f"family {self.name}: {sorted(stray)} are attention names but not sublayers; "
                f"add them to sublayers {self.sublayers} where the block runs them"
            )
