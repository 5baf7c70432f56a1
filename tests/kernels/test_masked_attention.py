"""masked_attention against a float64 softmax written out, and against SDPA for the size of its error."""

import pytest
import torch
import torch.nn.functional as F

from dit_accel.testing import assert_as_accurate_as, far_from_zero
from dit_accel_kernels.masked_attention import WindowMask, masked_attention, reference, window_mask
from dit_accel_kernels.masked_attention.masks import rows_of

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [
    pytest.param((1, 1, 1, 1, 1), id="one_token"),
    pytest.param((2, 61, 61, 3, 12), id="self_odd"),
    pytest.param((2, 61, 7, 3, 72), id="cross_short_keys"),
    pytest.param((1, 5, 129, 2, 64), id="cross_long_keys"),
]


def tensors(shape, dtype, kv_batch=None):
    B, Nq, Nk, H, D = shape
    kv = (kv_batch or B, Nk, H, D)
    return (
        far_from_zero(B, Nq, H, D, dtype=dtype, seed=1),
        far_from_zero(*kv, dtype=dtype, seed=2),
        far_from_zero(*kv, dtype=dtype, seed=3),
    )


def some_keys(Nq, Nk, H=1):
    """A random mask in which every query sees at least one key."""
    keep = torch.rand(H, Nq, Nk, generator=torch.Generator().manual_seed(4)) < 0.4
    keep[:, torch.arange(Nq), torch.arange(Nq) % Nk] = True
    return keep


def by_definition(q, k, v, keep, scale=None, compute=torch.float64):
    """The equations of the op."""
    q, k, v = q.to(compute), k.to(compute).expand(q.shape[0], -1, -1, -1), v.to(compute)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~keep, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.where(keep & lse.isfinite()[..., None], (scores - lse[..., None]).exp(), 0.0)
    out = torch.einsum("bhij,bjhd->bihd", weights, v.expand(q.shape[0], -1, -1, -1))
    return out, lse.transpose(1, 2)


def by_sdpa(q, k, v, keep):
    """What PyTorch itself makes of it in the same dtype."""
    k, v = (x.expand(q.shape[0], -1, -1, -1) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_out_is_as_accurate_as_sdpa(shape, dtype):
    q, k, v = tensors(shape, dtype)
    keep = some_keys(shape[1], shape[2])

    out, _ = masked_attention(q, k, v, mask=keep)

    assert out.dtype == dtype
    assert_as_accurate_as(out, by_sdpa(q, k, v, keep), by_definition(q, k, v, keep)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_lse_is_natural_and_at_least_float32(shape, dtype):
    q, k, v = tensors(shape, dtype)
    keep = some_keys(shape[1], shape[2])

    _, lse = masked_attention(q, k, v, mask=keep)

    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert lse.shape == q.shape[:3]
    plain = by_definition(q, k, v, keep, compute=lse.dtype)[1]
    assert_as_accurate_as(lse, plain, by_definition(q, k, v, keep)[1])


def test_no_mask_is_full_attention():
    q, k, v = tensors((2, 61, 61, 3, 12), torch.float32)
    everything = torch.ones(61, 61, dtype=torch.bool)

    out, _ = masked_attention(q, k, v)

    assert_as_accurate_as(out, by_sdpa(q, k, v, None), by_definition(q, k, v, everything)[0])


def test_scale_replaces_the_default():
    q, k, v = tensors((1, 9, 9, 2, 12), torch.float64)
    keep = some_keys(9, 9)

    _, lse = masked_attention(q, k, v, mask=keep, scale=0.5)

    exact = by_definition(q, k, v, keep, scale=0.5)[1]
    assert_as_accurate_as(lse, exact, exact)


def test_keys_and_values_of_one_sample_serve_the_whole_batch():
    q, k, v = tensors((3, 61, 7, 2, 12), torch.float32, kv_batch=1)

    out, lse = masked_attention(q, k, v, mask=some_keys(61, 7))

    again, lse_again = masked_attention(
        q, k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), mask=some_keys(61, 7)
    )
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)


def test_each_head_has_its_own_mask():
    q, k, v = tensors((2, 60, 60, 4, 12), torch.float32)
    window = WindowMask(grid=(3, 4, 5), radius=(1, 1, 1))
    masks = [None, window, some_keys(60, 60)[0], window & some_keys(60, 60)[0]]

    out, lse = masked_attention(q, k, v, mask=masks)

    for head, mask in enumerate(masks):
        one = slice(head, head + 1)
        tensors_of_head = q[:, :, one], k[:, :, one], v[:, :, one]
        alone, lse_alone = masked_attention(*tensors_of_head, mask=mask)
        keep = torch.ones(60, 60, dtype=torch.bool) if mask is None else rows_of(mask, 0, 60, "cpu")
        exact, lse_exact = by_definition(*tensors_of_head, keep)
        assert_as_accurate_as(out[:, :, one], alone, exact)
        assert_as_accurate_as(lse[:, :, one], lse_alone, lse_exact)


def test_a_query_that_sees_nothing_weighs_nothing():
    q, k, v = tensors((2, 6, 6, 2, 12), torch.float32)
    keep = some_keys(6, 6).clone()
    keep[:, 2] = False

    out, lse = masked_attention(q, k, v, mask=keep)

    assert (out[:, 2] == 0).all()
    assert (lse[:, 2] == float("-inf")).all()
    plain = by_definition(q, k, v, keep, compute=torch.float32)[0]
    assert_as_accurate_as(out, plain, by_definition(q, k, v, keep)[0])


def test_two_halves_of_the_keys_merge_into_the_whole():
    q, k, v = tensors((2, 61, 61, 3, 12), torch.float64)
    left = torch.arange(61).expand(61, 61) < 20
    left[5] = False  # an empty part must not disturb the merge

    (out_a, lse_a), (out_b, lse_b) = (masked_attention(q, k, v, mask=half) for half in (left, ~left))
    lse = torch.logaddexp(lse_a, lse_b)
    merged = out_a * (lse_a - lse).exp()[..., None] + out_b * (lse_b - lse).exp()[..., None]

    whole, lse_whole = masked_attention(q, k, v)
    assert_as_accurate_as(lse, lse_whole, by_definition(q, k, v, torch.ones_like(left))[1])
    # two roundings more than the whole: each part's weight and their sum
    assert_as_accurate_as(merged, whole, by_definition(q, k, v, torch.ones_like(left))[0], factor=4)


@pytest.mark.parametrize("grid,num_text", [((3, 4, 5), 0), ((3, 4, 5), 7), ((1, 9, 1), 2)])
def test_a_window_that_covers_the_grid_is_full_attention(grid, num_text):
    window = WindowMask(grid, radius=tuple(size - 1 for size in grid), num_text=num_text)
    N = window.shape[0]
    q, k, v = tensors((2, N, N, 2, 12), torch.float32)

    for windowed, full in zip(masked_attention(q, k, v, mask=window), masked_attention(q, k, v), strict=True):
        assert torch.equal(windowed, full)


def test_long_sequences_go_through_in_chunks(monkeypatch):
    window = WindowMask((3, 4, 5), (1, 1, 1), num_text=2)
    q, k, v = tensors((2, 62, 62, 3, 12), torch.float32)
    whole = masked_attention(q, k, v, mask=window)
    rows = []
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", 2 * 3 * 62 * 5)  # five queries
    monkeypatch.setattr(
        reference, "_attend", lambda *a, f=reference._attend: rows.append(a[0].shape[2]) or f(*a)
    )

    chunked = masked_attention(q, k, v, mask=window)

    assert rows == [5] * 12 + [2]
    exact = by_definition(q, k, v, window.rows(0, 62))
    for part, reference_part, exact_part in zip(chunked, whole, exact, strict=True):
        assert_as_accurate_as(part, reference_part, exact_part)


def test_a_mask_may_hide_padded_text_of_one_sample(monkeypatch):
    monkeypatch.setattr(
        reference, "SCORES_AT_ONCE", 2 * 3 * 62 * 20
    )  # the one row of `seen` serves every chunk
    q, k, v = tensors((2, 62, 62, 3, 12), torch.float64)
    seen = torch.ones(2, 1, 1, 62, dtype=torch.bool)
    seen[1, ..., :2] = False
    window = WindowMask((3, 4, 5), (1, 1, 1), num_text=2)

    lazy = masked_attention(q, k, v, mask=window & seen)
    dense = masked_attention(q, k, v, mask=window_mask((3, 4, 5), (1, 1, 1), num_text=2) & seen)

    assert torch.equal(lazy[0], dense[0])
    assert torch.equal(lazy[1], dense[1])


def test_gradients_flow_to_all_inputs():
    q, k, v = (x.requires_grad_() for x in tensors((1, 6, 6, 2, 4), torch.float64))
    keep = some_keys(6, 6)

    assert torch.autograd.gradcheck(lambda *x: masked_attention(*x, mask=keep), (q, k, v))


@pytest.mark.parametrize(
    "mask,message",
    [
        (
            torch.zeros(6, 5, dtype=torch.bool),
            r"must broadcast to \[B, H, Nq, Nk\] = \[1, 2, 6, 6\]; got \[6, 5\]",
        ),
        (torch.zeros(6, 6), r"a mask is bool.*got torch.float32"),
        ([None], r"1 masks for 2 heads"),
    ],
    ids=["shape", "dtype", "heads"],
)
def test_a_wrong_mask_says_what_was_expected(mask, message):
    q, k, v = tensors((1, 6, 6, 2, 4), torch.float32)
    with pytest.raises(ValueError, match=message):
        masked_attention(q, k, v, mask=mask)


def test_wrong_shapes_are_all_named():
    q, k, v = tensors((2, 6, 6, 2, 4), torch.float32)
    with pytest.raises(ValueError, match=r"got q \[2, 6, 2, 4\], k \[2, 6, 1, 4\], v \[2, 6, 2, 4\]"):
        masked_attention(q, k[:, :, :1], v)
