"""cache-dit (https://github.com/vipshop/cache-dit), switched on as its users do, and off again.

It keeps the attention backend that the pipeline has and resets itself at each call. It replaces `__call__` of
the pipeline's class, so all pipelines of that class feel it until it is off. Checked with cache-dit 1.5.3.
"""

import importlib
import importlib.util
import logging
import os
from typing import Any

from dit_accel.bench.scene import Scene

# steps that are always computed: the default of 8 suits schedules of more than 20 steps, and its Taylor
# expansion starts at the third step that is computed
WARM_UP, WARM_UP_TAYLOR = 2, 3
FIRST_BLOCKS = 1  # always computed; its default of 8 suits deeper models


def missing() -> str | None:
    """Why there is no cache-dit here."""
    if importlib.util.find_spec("cache_dit") is not None:
        return None
    return "cache-dit is not installed; pip install 'dit_accel[rivals]'"


def plain(scene: Scene, threshold: float) -> None:
    """DBCache: blocks after the first are skipped while its residual changed by less than `threshold`."""
    _enable(scene, _library(), {"residual_diff_threshold": threshold})


def taylor(scene: Scene, threshold: float) -> None:
    """DBCache whose skipped blocks are forecast by a Taylor expansion of order 1."""
    _enable(scene, _library(), {"residual_diff_threshold": threshold}, order=1)


def masked(scene: Scene, policy: str) -> None:
    """DBCache with Taylor and a published mask of the steps to compute: slow, medium, fast or ultra.

    Between the mask's steps blocks are skipped whatever their change is ("static").
    """
    library = _library()
    mask = library.steps_mask(mask_policy=policy, total_steps=scene.steps)
    settings = {"steps_computation_mask": mask, "steps_computation_policy": "static"}
    _enable(scene, library, settings, order=1)


def _library() -> Any:
    # it reads its level when it is imported, and tells of every setting at every call
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    library = importlib.import_module("cache_dit")
    logging.getLogger("CACHE_DIT").setLevel(logging.ERROR)
    return library


def _enable(scene: Scene, library: Any, settings: dict[str, Any], order: int | None = None) -> None:
    config = library.DBCacheConfig(
        Fn_compute_blocks=FIRST_BLOCKS,
        Bn_compute_blocks=0,
        max_warmup_steps=WARM_UP if order is None else WARM_UP_TAYLOR,
        **settings,
    )
    forecast = None if order is None else library.TaylorSeerCalibratorConfig(taylorseer_order=order)
    scene.undo.callback(library.disable_cache, scene.pipe)
    library.enable_cache(scene.pipe, cache_config=config, calibrator_config=forecast)
