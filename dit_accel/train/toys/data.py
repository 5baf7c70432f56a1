"""What training may see, by construction: seeds below `FIRST_UNSEEN_SEED`, captions that are not held out."""

import numpy as np

from dit_accel.scenes import Scene, is_held_out, sample_scene

FIRST_UNSEEN_SEED = 1 << 30


def training_scene(rng: np.random.Generator, moving: bool) -> tuple[Scene, int]:
    """A random scene of the training set, and the seed of its layout."""
    while is_held_out(str(scene := sample_scene(rng, moving))):
        pass
    return scene, int(rng.integers(0, FIRST_UNSEEN_SEED))


def unseen_pairs(count: int, moving: bool, seed: int = 0) -> list[tuple[Scene, int]]:
    """`count` pairs of a held-out scene and a seed no training run can have drawn."""
    rng = np.random.default_rng([seed, FIRST_UNSEEN_SEED])
    pairs = []
    while len(pairs) < count:
        scene = sample_scene(rng, moving)
        if is_held_out(str(scene)):
            pairs.append((scene, FIRST_UNSEEN_SEED + int(rng.integers(0, FIRST_UNSEEN_SEED))))
    return pairs
