"""Key coresets: which keys are kept, what the centre stands for, and where nothing is lost."""

from types import SimpleNamespace

import pytest
import torch

from dit_accel.methods.attention.coreset import Coreset, _buckets, select
from dit_accel.visit import AttentionVisit

GRID, CPU = (3, 4, 5), torch.device("cpu")


def make_visit(k=None, num_text=0, text_first=True) -> AttentionVisit:
    generator = torch.Generator().manual_seed(0)
    q, keys, v = torch.randn(3, 2, 60 + num_text, 2, 32, generator=generator).unbind(0)
    k = keys + 1 if k is None else k

    def dense(q, k, v, mask):
        return written_out(q, k, v).to(q.dtype)

    rows = slice(0, num_text) if text_first else slice(60, 60 + num_text)
    call = SimpleNamespace(
        brick=None,
        checked_grid=lambda: GRID,
        num_text=num_text,
        text_first=text_first,
        dense=dense,
        text_rows=lambda _: rows,
    )
    return AttentionVisit(q, k, v + 3, None, 0.3, (0, 1), call)  # pyright: ignore


def written_out(q, k, v) -> torch.Tensor:
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * 0.3
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.double())


@pytest.mark.parametrize("bucket", [(2, 3, 2), (1, 2, 2), (1, 1, 1), (3, 4, 5), (4, 4, 8)])
def test_buckets_hold_every_token_once_and_open_with_their_centre(bucket):
    tokens, held = _buckets(GRID, bucket, CPU)
    assert tokens[held].sort().values.tolist() == list(range(60)) and held[:, 0].all()


def test_the_centre_of_a_bucket_is_its_middle():
    tokens, _ = _buckets((2, 3, 2), (2, 3, 2), CPU)
    assert tokens[0, 0] == 9  # frame 1, row 1, column 1
    assert Coreset(0.5, (2, 3, 2)).kept == 6


@pytest.mark.parametrize("bucket", [(2, 3, 2), (2, 4, 2), (4, 4, 8)])  # the last two leave a short bucket
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("num_text", [0, 4])
def test_without_dropping_it_is_full_attention(num_text, text_first, bucket):
    visit = make_visit(None, num_text, text_first)
    found = Coreset(0, bucket).attend(visit)
    torch.testing.assert_close(found.double(), written_out(visit.q, visit.k, visit.v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bucket", [(2, 3, 2), (2, 4, 2)])  # the second leaves a short bucket
@pytest.mark.parametrize("rho", [0.25, 0.5, 0.99])
def test_keys_equal_to_their_centre_lose_nothing(rho, bucket):
    """The centre's weight and the mean of the values do what the dropped keys did."""
    tokens, held = _buckets(GRID, bucket, CPU)
    k = torch.empty(2, 60, 2, 32)
    for number, (each, own) in enumerate(zip(tokens, held, strict=True)):
        generator = torch.Generator().manual_seed(number)
        k[:, each[own]] = torch.randn(2, 1, 2, 32, generator=generator)
    visit = make_visit(k)
    found = Coreset(rho, bucket).attend(visit)
    torch.testing.assert_close(found.double(), written_out(visit.q, visit.k, visit.v), rtol=1e-5, atol=1e-5)


def test_the_most_similar_keys_are_dropped():
    k = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [2.0, 0.1]])[None, :, None]  # [1, 4, 1, 2]
    v = torch.tensor([[0.0, 0.0], [3.0, 3.0], [5.0, 5.0], [9.0, 9.0]])[None, :, None]
    tokens, held = torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 4, dtype=torch.bool)
    keys, values, weight = select(k, v, tokens, held, 2)
    assert keys[0, :, 0].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert values[0, :, 0].tolist() == [[4.0, 4.0], [5.0, 5.0]]  # the centre with its two likenesses
    torch.testing.assert_close(weight[0, 0], torch.tensor([3.0, 1.0]).log())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Coreset(rho=1.0), "rho must be a share from 0 to below 1; got 1.0"),
        (lambda: Coreset(bucket=(9, 9, 9)), "of 1 to 128 tokens together"),
    ],
)
def test_wrong_parameters_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
