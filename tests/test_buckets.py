"""Buckets of neighbouring tokens: every token in one, what is kept of each, and rows put back."""

import pytest
import torch
from methods.coreset_oracle import split, tokens_of_buckets

from dit_accel.bricks import lay_bricks
from dit_accel.buckets import Selection, lay_buckets, select
from dit_accel.testing import far_from_zero

GRID, CPU = (3, 4, 5), torch.device("cpu")
BUCKETS = [(2, 3, 2), (1, 2, 2), (1, 1, 1), (3, 4, 5), (4, 4, 8), (2, 4, 2)]


@pytest.mark.parametrize("brick", [None, (1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("bucket", BUCKETS)
def test_buckets_hold_every_token_once_and_open_with_their_centre(bucket, brick):
    found = lay_buckets(GRID, bucket, CPU, brick)
    assert found.tokens[found.held].sort().values.tolist() == list(range(60)) and found.held[:, 0].all()
    assert torch.equal(found.tokens.flatten()[found.back], torch.arange(60))
    assert found.held.flatten()[found.back].all()


@pytest.mark.parametrize("grid", [GRID, (2, 6, 4), (5, 3, 7)])
@pytest.mark.parametrize("bucket", BUCKETS)
def test_buckets_are_boxes_walked_to_and_fro(bucket, grid):
    found = lay_buckets(grid, bucket, CPU)
    wanted = tokens_of_buckets(grid, bucket)
    assert [set(row[own].tolist()) for row, own in zip(found.tokens, found.held, strict=True)] == [
        set(each) for each in wanted
    ]


def test_buckets_of_tokens_in_brick_order_are_the_same_tokens():
    raster, placed = (lay_buckets(GRID, (2, 3, 2), CPU, brick) for brick in (None, (1, 2, 2)))
    order = lay_bricks(GRID, 0, (1, 2, 2)).order
    assert torch.equal(order[placed.tokens], raster.tokens)


def test_the_centre_of_a_bucket_is_its_middle():
    assert lay_buckets((2, 3, 2), (2, 3, 2), CPU).tokens[0, 0] == 9  # frame 1, row 1, column 1
    assert lay_buckets((2, 3, 2), (2, 3, 2), CPU).whole
    assert not lay_buckets(GRID, (2, 4, 2), CPU).whole


@pytest.mark.parametrize("kept", [1, 6, 12])
@pytest.mark.parametrize("bucket", [(2, 3, 2), (3, 2, 2), (2, 2, 3)])
def test_the_centre_and_what_is_least_similar_to_it_is_kept(bucket, kept):
    x = far_from_zero(2, 60, 3, 32)
    buckets = lay_buckets(GRID, bucket, CPU)
    chosen = select(x, buckets, kept)
    assert chosen.kept.shape == (2, 3, 5, kept)
    for sample in range(2):
        for head in range(3):
            found = buckets.tokens.gather(1, chosen.kept[sample, head])
            one = x[sample, :, head].double()
            wanted = [split(one, each, bucket, kept)[0] for each in tokens_of_buckets(GRID, bucket)]
            assert found.tolist() == wanted


def test_a_short_bucket_drops_nothing_while_it_has_room():
    """Not even tokens whose cosine with the centre is a rounding above that of the centre with itself."""
    x, buckets = far_from_zero(8, 60, 3, 32), lay_buckets(GRID, (2, 4, 2), CPU)
    own = tokens_of_buckets(GRID, (2, 4, 2))[-1]
    x[:, own] = x[:, own[-1:]] * torch.linspace(0.3, 3, 12)[:, None, None]
    kept = select(x, buckets, 12).kept[:, :, -1]
    assert buckets.held[-1][kept].all()


def test_rows_are_copied_back_from_their_centre():
    """Rows that carry the number of their token: a kept one has its own, a dropped one its centre's."""
    x, bucket = far_from_zero(2, 60, 2, 8), (2, 4, 2)  # 60 = 3 * 16 + 12: the last bucket is short
    buckets = lay_buckets(GRID, bucket, CPU)
    chosen = select(x, buckets, 7)
    numbered = torch.arange(60.0)[None, :, None, None].expand(2, -1, 2, 8)
    back = chosen.copy_back(chosen.gather(numbered))
    for sample in range(2):
        for head in range(2):
            for tokens in tokens_of_buckets(GRID, bucket):
                staying, dropped = split(x[sample, :, head], tokens, bucket, 7)
                assert back[sample, staying, head, 0].tolist() == staying
                assert back[sample, dropped, head, 0].tolist() == [staying[0]] * len(dropped)


def one_bucket(kept: int) -> Selection:
    k = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [2.0, 0.1]])[None, :, None]  # [1, 4, 1, 2]
    return select(k, lay_buckets((1, 4, 1), (1, 4, 1), CPU), kept)


def test_a_stand_in_has_the_mean_value_and_the_votes_of_what_it_stands_for():
    v = torch.tensor([5.0, 3.0, 9.0, 0.0])[None, :, None, None].expand(-1, -1, 1, 2)
    # the centre is token 2; 0 is least like it, then 3: they stay, and 1 is dropped
    values, weight = one_bucket(3).stand_ins(v, torch.zeros(1, 1, 1, 4))
    assert values[0, :, 0, 0].tolist() == [6.0, 5.0, 0.0]
    torch.testing.assert_close(weight[0, 0], torch.tensor([2.0, 1.0, 1.0]).log())


@pytest.mark.parametrize(
    ("hidden", "value", "votes"),
    [([2], 3.0, 1.0), ([1], 9.0, 1.0), ([1, 2], 0.0, 0.0), ([0, 3], 6.0, 2.0)],
)
def test_hidden_keys_have_no_votes(hidden, value, votes):
    v = torch.tensor([5.0, 3.0, 9.0, 0.0])[None, :, None, None].expand(-1, -1, 1, 2)
    buckets = lay_buckets((1, 4, 1), (1, 4, 1), CPU)
    bias = torch.zeros(1, 1, 4)
    bias[..., hidden] = -torch.inf
    values, weight = one_bucket(3).stand_ins(v, buckets.bias(bias))
    assert values[0, 0, 0, 0] == value and weight[0, 0, 0].exp() == votes
    assert weight.exp()[0, 0, 1:].tolist() == [0.0 if token in hidden else 1.0 for token in (0, 3)]
