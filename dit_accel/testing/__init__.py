"""For tests, ours and yours: tiny random pipelines of the real diffusers classes, and accuracy by budget."""

from dit_accel.testing.accuracy import assert_as_accurate_as, far_from_zero, poisoned_memory
from dit_accel.testing.pipelines import TINY, TinyPipeline

__all__ = ["TINY", "TinyPipeline", "assert_as_accurate_as", "far_from_zero", "poisoned_memory"]
