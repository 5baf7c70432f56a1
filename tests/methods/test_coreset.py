"""Coresets of queries, keys and both, against the paper's words in float64, and where nothing is lost."""

from types import SimpleNamespace

import pytest
import torch
from methods.coreset_oracle import attend as attend_densely
from methods.coreset_oracle import coreset_attention, tokens_of_buckets

from dit_accel.bricks import lay_bricks
from dit_accel.buckets import lay_buckets
from dit_accel.errors import Slower, Unmet
from dit_accel.methods.attention import coreset
from dit_accel.methods.attention.coreset import Coreset
from dit_accel.testing import assert_as_accurate_as, far_from_zero
from dit_accel.visit import AttentionVisit
from dit_accel_kernels.block_attention import break_even

GRID, SCALE = (3, 4, 5), 0.3
SELECTIONS = [
    pytest.param({}, id="keys"),
    pytest.param({"reweight": False}, id="keys_as_published"),
    pytest.param({"queries": "selected", "keys": "all"}, id="queries"),
    pytest.param({"queries": "selected"}, id="both_apart"),
    pytest.param({"queries": "selected", "keys": "as_queries"}, id="both_alike"),
    pytest.param({"queries": "selected", "reweight": False}, id="as_published_for_hunyuan"),
    pytest.param({"queries": "selected", "keys": "as_queries", "reweight": False}, id="as_published_for_wan"),
]
TEXTS = [(0, True), (4, True), (4, False)]


def make_visit(qkv=None, num_text=0, text_first=True, mask=None, grid=GRID, brick=None) -> AttentionVisit:
    """Two samples, two heads of width 32, with a mean far from zero."""
    tokens = grid[0] * grid[1] * grid[2]
    q, k, v = far_from_zero(3, 2, tokens + num_text, 2, 32) if qkv is None else qkv

    def dense(q, k, v, mask):
        bias = torch.zeros(()) if mask is None else torch.where(mask, 0.0, -torch.inf)
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * SCALE + bias
        return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)

    rows = slice(0, num_text) if text_first else slice(tokens, tokens + num_text)
    call = SimpleNamespace(
        brick=brick,
        checked_grid=lambda: grid,
        num_text=num_text,
        text_first=text_first,
        dense=dense,
        text_rows=lambda _: rows,
    )
    return AttentionVisit(q, k, v, mask, SCALE, (0, 1), call)  # pyright: ignore


def hidden_keys(*tokens: int, of: int) -> torch.Tensor:
    """A mask [2, 1, 1, N] whose second sample hides some keys."""
    mask = torch.ones(2, 1, 1, of, dtype=torch.bool)
    mask[1, ..., list(tokens)] = False
    return mask


def by_hand(method: Coreset, visit: AttentionVisit, dtype: torch.dtype) -> torch.Tensor:
    q, k, v = (x.to(dtype) for x in (visit.q, visit.k, visit.v))
    return coreset_attention(
        q, k, v, visit.grid, method.bucket, method.kept, method.queries, method.keys, method.reweight,
        visit.key_bias(), SCALE, visit.num_text, visit.text_first,
    )  # fmt: skip


def assert_by_hand(method: Coreset, visit: AttentionVisit) -> None:
    found = method.attend(visit)
    by_definition = [by_hand(method, visit, dtype) for dtype in (torch.float32, torch.float64)]
    # the largest of so few errors is chance: the op sums block by block, the reference a whole row
    assert_as_accurate_as(found, *by_definition, factor=4)


def densely(visit: AttentionVisit) -> torch.Tensor:
    """Dense attention in float64 [B, N, h, D]."""
    q, k, v = (x.double() for x in (visit.q, visit.k, visit.v))
    B, N, h, _ = q.shape
    bias = visit.key_bias()
    bias = (torch.zeros(1, 1, N) if bias is None else bias).expand(B, h, N).double()
    heads = [
        [attend_densely(q[b, :, i], k[b, :, i], v[b, :, i], bias[b, i], SCALE) for i in range(h)]
        for b in range(B)
    ]
    return torch.stack([torch.stack(each, dim=1) for each in heads])


def close(found, wanted):
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parameters", SELECTIONS)
@pytest.mark.parametrize("bucket", [(2, 3, 2), (2, 4, 2)])  # the second leaves a short bucket
@pytest.mark.parametrize(("num_text", "text_first"), TEXTS)
def test_it_is_what_the_paper_says(num_text, text_first, bucket, parameters):
    assert_by_hand(Coreset(bucket=bucket, **parameters), make_visit(None, num_text, text_first))


@pytest.mark.parametrize("parameters", SELECTIONS)
@pytest.mark.parametrize("grid", [(4, 6, 4), (5, 3, 7), (1, 9, 11)])  # whole buckets, ragged ones, an image
def test_any_grid(grid, parameters):
    assert_by_hand(Coreset(**parameters), make_visit(grid=grid))


@pytest.mark.parametrize("parameters", SELECTIONS)
@pytest.mark.parametrize("rho", [0.1, 0.75, 0.99])  # the last keeps the centres alone
def test_any_share(rho, parameters):
    assert_by_hand(Coreset(rho, **parameters), make_visit())


@pytest.mark.parametrize("parameters", SELECTIONS)
@pytest.mark.parametrize("bucket", [(2, 3, 2), (2, 4, 2)])
@pytest.mark.parametrize(("num_text", "text_first"), TEXTS)
def test_hidden_keys_are_not_seen(num_text, text_first, bucket, parameters):
    """Visual and text keys of one sample, centres among them."""
    offset = num_text if text_first else 0
    hidden = [token + offset for token in (0, 26, 33, 34, 59)]
    hidden += [1 if text_first else 61] if num_text else []
    centres = lay_buckets(GRID, bucket, torch.device("cpu")).tokens[:, 0] + offset
    mask = hidden_keys(*hidden, int(centres[0]), of=60 + num_text)
    assert_by_hand(Coreset(bucket=bucket, **parameters), make_visit(None, num_text, text_first, mask))


@pytest.mark.parametrize("parameters", SELECTIONS)
def test_what_is_hidden_does_not_matter(parameters):
    """The values of hidden keys reach no output, and are in no mean."""
    mask = hidden_keys(0, 26, 59, of=60)
    q, k, v = far_from_zero(3, 2, 60, 2, 32)
    before = Coreset(**parameters).attend(make_visit((q, k, v), mask=mask))
    v = v.clone()
    v[1, [0, 26, 59]] = 1000.0
    assert torch.equal(before, Coreset(**parameters).attend(make_visit((q, k, v), mask=mask)))


@pytest.mark.parametrize("parameters", SELECTIONS)
@pytest.mark.parametrize("brick", [(1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize(("num_text", "text_first"), TEXTS)
def test_tokens_in_brick_order_give_the_same_rows(num_text, text_first, brick, parameters):
    method, raster = Coreset(**parameters), make_visit(None, num_text, text_first)
    order = lay_bricks(GRID, 0, brick).order
    text = torch.arange(num_text)
    order = torch.cat([text, order + num_text] if text_first else [order, text + 60])
    moved = [x[:, order] for x in (raster.q, raster.k, raster.v)]
    placed = make_visit(moved, num_text, text_first, brick=brick)
    close(method.attend(placed), method.attend(raster)[:, order].double())


@pytest.mark.parametrize("parameters", SELECTIONS)
@pytest.mark.parametrize("bucket", [(2, 3, 2), (2, 4, 2), (4, 4, 8)])  # the last two leave a short bucket
@pytest.mark.parametrize(("num_text", "text_first"), TEXTS)
def test_without_dropping_it_is_full_attention(num_text, text_first, bucket, parameters):
    mask = hidden_keys(3, 40, of=60 + num_text)
    for visit in (make_visit(None, num_text, text_first), make_visit(None, num_text, text_first, mask)):
        close(Coreset(0, bucket, **parameters).attend(visit), densely(visit))


def equal_in_buckets(x: torch.Tensor, bucket) -> torch.Tensor:
    """x [B, 60, h, D] in which every token of a bucket is its first."""
    x = x.clone()
    for tokens in tokens_of_buckets(GRID, bucket):
        x[:, tokens] = x[:, tokens[:1]]
    return x


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bucket", [(2, 3, 2), (2, 4, 2)])  # the second leaves a short bucket
@pytest.mark.parametrize("rho", [0.25, 0.5, 0.99])
@pytest.mark.parametrize("parameters", [each for each in SELECTIONS if "published" not in str(each.id)])
def test_tokens_equal_to_their_centre_lose_nothing(parameters, rho, bucket, masked):
    """The centre's row is theirs; its weight and the mean of the values do what the dropped keys did."""
    q, k, v = far_from_zero(3, 2, 60, 2, 32)
    mask = hidden_keys(0, 17, 26, 59, of=60) if masked else None
    visit = make_visit((equal_in_buckets(q, bucket), equal_in_buckets(k, bucket), v), mask=mask)
    close(Coreset(rho, bucket, **parameters).attend(visit), densely(visit))


def test_as_published_a_bucket_loses_votes():
    """6 of 12 in each of the 5 buckets, which changes nothing among equal tokens until there is text."""
    published = Coreset(queries="selected", keys="as_queries", reweight=False)
    q, k, v = (equal_in_buckets(x, (2, 3, 2)) for x in far_from_zero(3, 2, 60, 2, 32))
    close(published.attend(make_visit((q, k, v))), densely(make_visit((q, k, v))))
    q, k, v = (torch.cat([x, far_from_zero(2, 4, 2, 32, seed=1)], dim=1) for x in (q, k, v))
    with_text = make_visit((q, k, v), 4, False)
    off = (published.attend(with_text) - densely(with_text)).abs()
    assert off[:, :60].max() > 1e-2 and off[:, 60:].max() < 1e-5  # text has its votes, and its rows are exact


@pytest.mark.parametrize("parameters", SELECTIONS)
def test_samples_and_heads_select_by_themselves(parameters):
    """Each alone gives what it gives beside the others; the two of a pair do not select the same."""
    method, both = Coreset(**parameters), make_visit()
    found = method.attend(both)
    for sample in range(2):
        for head in range(2):
            alone = [x[sample : sample + 1, :, head : head + 1] for x in (both.q, both.k, both.v)]
            close(method.attend(make_visit(alone)), found[sample : sample + 1, :, head : head + 1].double())


def test_a_dropped_row_is_its_centres_row():
    found = Coreset(0.99, (2, 3, 2), "selected", "all").attend(make_visit(grid=(4, 6, 4)))
    for tokens in tokens_of_buckets((4, 6, 4), (2, 3, 2)):
        assert (found[:, tokens] == found[:, [tokens[9]]]).all()
    assert found[:, :, 0].unique(dim=1).shape[1] == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", SELECTIONS)
def test_low_precision_keeps_its_dtype_and_its_accuracy(parameters, dtype):
    qkv = [x.to(dtype) for x in far_from_zero(3, 2, 60, 2, 32)]
    method, visit = Coreset(**parameters), make_visit(qkv)
    found, exact = method.attend(visit), by_hand(method, visit, torch.float64)
    assert found.dtype is dtype
    assert_as_accurate_as(found, exact.to(dtype), exact)


def test_only_what_is_kept_is_attended(monkeypatch):
    """Rows and keys of the one call of the op: shares of 60 visual tokens, and all 4 of text."""
    seen = []
    plain = coreset.block_attention

    def watched(q, k, v, plan, **rest):
        seen.append((q.shape[1], k.shape[1], rest["key_bias"] is None))
        return plain(q, k, v, plan, **rest)

    monkeypatch.setattr(coreset, "block_attention", watched)
    for each in SELECTIONS:
        Coreset(**each.values[0]).attend(make_visit(num_text=4))
    assert seen == [
        (60, 34, False), (60, 34, True), (30, 64, True), (30, 34, False), (30, 34, False), (30, 34, True),
        (30, 34, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("parameters", "density"),
    [
        ({}, 0.5), ({"queries": "selected", "keys": "all"}, 0.5), ({"queries": "selected"}, 0.25),
        ({"rho": 0.75}, 0.25), ({"rho": 0.75, "queries": "selected"}, 0.06), ({"rho": 0.0}, 1.0),
    ],
)  # fmt: skip
def test_it_runs_dense_where_that_is_faster_than_the_work_that_is_kept(monkeypatch, parameters, density):
    for limit, slower in ((density + 0.02, False), (density - 0.02, True)):
        monkeypatch.setattr(break_even, "density", lambda *given, limit=limit: limit)
        visit = make_visit(grid=(4, 6, 4))
        if slower:
            with pytest.raises(Slower, match=f"density {density:.2f} is slower than dense here"):
                Coreset(**parameters).attend(visit)
        else:
            Coreset(**parameters).attend(visit)


def test_a_mask_that_differs_from_query_to_query_is_refused():
    visit = make_visit(mask=torch.ones(60, 60, dtype=torch.bool).tril())
    with pytest.raises(Unmet, match="differs from query to query"):
        Coreset(queries="selected", keys="all").attend(visit)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Coreset(rho=1.0), "rho must be a share from 0 to below 1; got 1.0"),
        (lambda: Coreset(bucket=(9, 9, 9)), "of 1 to 128 tokens together"),
        (lambda: Coreset(queries="half"), 'queries must be one of all, selected; got "half"'),
        (lambda: Coreset(keys="none"), 'keys must be one of all, selected, as_queries; got "none"'),
        (lambda: Coreset(keys="all"), 'keys = "all" selects nothing to drop: give queries = "selected", or'),
        (lambda: Coreset(keys="as_queries"), 'queries = "all" with keys = "as_queries" selects nothing'),
    ],
)
def test_wrong_parameters_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_a_recipe_said_before_it_says_still():
    assert Coreset(0.25, (1, 2, 2)) == Coreset(0.25, (1, 2, 2), queries="all", keys="selected", reweight=True)
    assert Coreset().kept == 6
