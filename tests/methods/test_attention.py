"""Methods of one attention call against float64 attention written out, without a pipeline around them."""

from types import SimpleNamespace

import pytest
import torch

from dit_accel.block_heads import Near, key_bias
from dit_accel.errors import MissingAnchor, RecipeError, Slower, Unmet
from dit_accel.methods.attention.arrow import Arrow
from dit_accel.methods.attention.brick import Brick
from dit_accel.methods.attention.full import Full
from dit_accel.methods.attention.residual import Residual
from dit_accel.methods.attention.tail import Tail
from dit_accel.methods.attention.window import Window
from dit_accel.recipe import Recipe
from dit_accel.run_report import method_name
from dit_accel.visit import AttentionVisit
from dit_accel_kernels.block_attention import break_even
from dit_accel_kernels.masked_attention import window_mask

GRID, TEXT = (3, 4, 5), 4
BRICK = (1, 2, 2)
EVERYTHING = (9, 9, 9)


class Call:
    """What a visit asks of the call around it; its memory is a dictionary."""

    def __init__(self, num_text: int, text_first: bool):
        self.num_text, self.text_first = num_text, text_first
        self.stored: dict[str, torch.Tensor] = {}
        self.notes: list[str] = []
        self.brick = None
        self.branch, self.key = "cond", ("transformer", "blocks.0.attn1")
        self.session = SimpleNamespace(note_once=lambda text, site: self.notes.append(text))

    def checked_grid(self):
        return GRID

    def store(self, name, value, heads):
        self.stored[name] = value.clone()

    def recall(self, name, branch, heads, max_age):
        if name not in self.stored:
            raise MissingAnchor(f"no {name}")
        return self.stored[name]


def make_visit(text_first=True, num_text=TEXT, mask=None, seed=0, call=None) -> AttentionVisit:
    """Two samples, two heads of width 32."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, 60 + num_text, 2, 32, generator=generator).unbind(0)
    return AttentionVisit(q, k + 1, v + 3, mask, 0.3, (0, 1), call or Call(num_text, text_first))


def written_out(visit, keep=None) -> torch.Tensor:
    """Attention in float64; `keep` is bool and broadcasts to [B, h, N, N]."""
    scores = torch.einsum("bnhd,bmhd->bhnm", visit.q.double(), visit.k.double()) * visit.scale
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), visit.v.double())


def close(found, wanted):
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("num_text", [0, TEXT])
@pytest.mark.parametrize("method", [Window, Arrow])
def test_a_window_of_one_token_blocks_is_the_window(method, num_text, text_first):
    visit = make_visit(text_first, num_text)
    keep = window_mask(GRID, (1, 0, 2), num_text, text_first)
    for one in (method((1, 0, 2), brick=(1, 1, 1)), method((1, 0, 2), mask="tokens")):
        close(one.attend(visit), written_out(visit, keep))


def test_a_window_on_blocks_sees_more_than_the_window():
    visit = make_visit()
    found = Window((0, 1, 1), brick=BRICK).attend(visit)
    assert not torch.allclose(found, Window((0, 1, 1), mask="tokens").attend(visit))
    assert not torch.allclose(found.double(), written_out(visit))


@pytest.mark.parametrize("text_first", [True, False])
def test_a_brick_that_sees_itself_only(text_first):
    visit = make_visit(text_first, num_text=0)
    frames, rows, columns = torch.unravel_index(torch.arange(60), GRID)
    own = torch.stack([frames, rows // 2, columns], dim=-1)
    keep = (own[:, None] == own[None]).all(-1)
    close(Brick((0, 0, 0), brick=(1, 2, 1)).attend(visit), written_out(visit, keep))


@pytest.mark.parametrize(
    "method", [Window(EVERYTHING), Brick(EVERYTHING, BRICK), Brick(((0, 1.0),) * 3, BRICK)]
)
def test_what_covers_the_grid_is_full_attention(method):
    visit = make_visit()
    close(method.attend(visit), written_out(visit))
    assert visit.call.notes == ["its tokens are put in brick order and back at every call"]


@pytest.mark.parametrize("method", [Tail, Residual])
@pytest.mark.parametrize("near", [{"extent": (0, 0, 1)}, {"radius": (1, 0, 0)}, {"extent": EVERYTHING}])
@pytest.mark.parametrize("text_first", [True, False])
def test_an_anchor_is_full_attention_and_completes_itself(text_first, near, method):
    """At age 0 near and far add up to the whole."""
    one, visit = method(**near, brick=BRICK), make_visit(text_first)
    close(one.anchor.attend(visit), written_out(visit))
    assert set(visit.call.stored) == set(one.keeps) == set(one.anchor.keeps)
    close(one.attend(visit), written_out(visit))


def test_a_tail_is_a_merge_and_a_residual_a_sum_of_old_and_new():
    keep = window_mask(GRID, (0, 1, 1), TEXT)
    old, near = make_visit(seed=1), {"radius": (0, 1, 1), "brick": (1, 1, 1)}
    new = make_visit(seed=2, call=old.call)
    tail, residual = Tail(**near), Residual(**near)
    tail.anchor.attend(old)
    residual.anchor.attend(old)
    close(residual.attend(new), written_out(new, keep) + written_out(old) - written_out(old, keep))
    # keys near from the new call, far ones from the old: one softmax over both
    scores = [torch.einsum("bnhd,bmhd->bhnm", x.q.double(), x.k.double()) * x.scale for x in (new, old)]
    whole = torch.cat([scores[0].masked_fill(~keep, -torch.inf), scores[1].masked_fill(keep, -torch.inf)], -1)
    values = torch.cat([new.v, old.v], dim=1).double()
    close(tail.attend(new), torch.einsum("bhnm,bmhd->bnhd", whole.softmax(-1), values))


def test_without_an_anchor_there_is_nothing_to_complete():
    with pytest.raises(MissingAnchor):
        Tail(extent=(0, 0, 0)).attend(make_visit())


@pytest.mark.parametrize("additive", [False, True])
def test_keys_hidden_by_a_mask_are_not_seen(additive):
    seen = torch.ones(2, 1, 1, 64, dtype=torch.bool)
    seen[0, ..., 1:4] = False
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) if additive else seen
    visit = make_visit(mask=mask)
    visit.v[0, 1:4] = 1e6
    close(Brick(EVERYTHING, BRICK).attend(visit), written_out(visit, seen))


def test_a_mask_of_two_or_four_axes_becomes_a_bias_of_its_keys():
    assert key_bias(None, 4) is None
    assert key_bias(torch.tensor([[True, False]]), 2).tolist() == [[[0.0, -torch.inf]]]
    assert key_bias(torch.tensor([[2.0]]), 3).tolist() == [[[2.0, 2.0, 2.0]]]
    with pytest.raises(Unmet, match="differs from query to query"):
        key_bias(torch.ones(2, 1, 3, 3, dtype=torch.bool), 3)


def test_wanted_gradients_are_no_case_for_the_op():
    visit = make_visit()
    visit.q.requires_grad_()
    with pytest.raises(Unmet, match="no backward"):
        Brick(EVERYTHING).attend(visit)
    Window(EVERYTHING, mask="tokens").attend(visit).sum().backward()
    assert visit.q.grad is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window((-1, 0, 0)), r"radius must be three numbers >= 0.*got \(-1, 0, 0\)"),
        (lambda: Brick((0, -2, 0)), "extent must be three numbers >= 0"),
        (lambda: Brick((1, 1, 1), brick=(4, 8, 8)), r"of 1 to 128 tokens together; got \(4, 8, 8\)"),
        (lambda: Window((1, 1, 1), mask="rows"), 'mask must be "blocks" or "tokens"'),  # pyright: ignore
        (lambda: Tail(), "give one of the two"),
        (lambda: Residual(extent=(1, 1, 1), radius=(1, 1, 1)), "give one of the two"),
        (lambda: Tail(extent=(1, 1, 1), max_age=-1), "max_age must be a number of steps >= 0"),
    ],
)
def test_wrong_parameters_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_equal_near_sets_share_a_plan():
    from dit_accel.block_heads import _plan

    visit = make_visit()
    Brick((0, 1, 1), BRICK).attend(visit)
    before = _plan.cache_info()
    Brick((0, 1, 1), BRICK).attend(make_visit(seed=1))
    assert _plan.cache_info().hits > before.hits and _plan.cache_info().misses == before.misses
    assert Near(extent=(0, 1, 1)) == Near(extent=(0, 1, 1)) != Near(radius=(0, 1, 1))


def choice(text: str) -> Recipe:
    return Recipe.from_text(f"schema = 1\n[choices]\nb = {{ {text} }}", source="my.toml")


def test_extents_of_a_recipe_may_be_rules():
    recipe = choice('method = "brick", extent = [1, [0, 0.25], 2], brick = [2, 8, 8]')
    assert recipe.method("b") == Brick((1, (0.0, 0.25), 2), (2, 8, 8))
    assert Recipe.from_text(recipe.to_toml()) == recipe
    tail = choice('method = "tail", radius = [9, 4, [2, 0.5]], max_age = 3').method("b")
    assert tail == Tail(radius=(9, 4, (2.0, 0.5)), max_age=3)
    assert tail.near == Near(radius=(9, 4, (2.0, 0.5)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'method = "brick"',
            "needs the parameter extent: a list of 3, each a whole number or a list of 2, each a nu",
        ),
        ('method = "brick", extent = [1, 1]', "needs extent to be a list of 3"),
        ('method = "brick", extent = [1, 0.5, 1]', "needs extent to be a list of 3"),
        ('method = "brick", extent = [1, [0, 1, 2], 1]', "needs extent to be a list of 3"),
        ('method = "brick", extent = [1, -1, 1]', "extent must be three numbers >= 0"),
        ('method = "brick", extent = [1, 1, 1], brick = [9, 9, 9]', "of 1 to 128 tokens together"),
        ('method = "tail"', "give one of the two"),
        ('method = "residual", extent = [1, 1, 1], age = 3', 'has no parameter "age"; nearest: max_age'),
        ('method = "window", radius = [1, 1, 1], mask = "token"', 'needs mask to be "blocks" or "tokens"'),
    ],
)
def test_a_wrong_choice_names_file_and_line(text, message):
    with pytest.raises(RecipeError, match=r"my\.toml:3: \[choices\] b: .*" + message):
        choice(text).method("b")


@pytest.mark.parametrize("brick", [None, BRICK])
def test_mixed_heads_in_one_call_are_each_alone(brick):
    """Slots of what heads read or leave behind stand in the order of the heads, not of the groups."""
    from dit_accel import block_heads
    from dit_accel.block_heads import Part
    from dit_accel_kernels.block_attention import Kind

    generator = torch.Generator().manual_seed(0)
    q, k, v, far = torch.randn(4, 2, 64, 6, 32, generator=generator).unbind(0)
    lse, left = torch.randn(2, 64, 6, generator=generator), {}
    tokens = block_heads.Tokens(q, k, v, None, 0.3, GRID, TEXT, True, brick)
    near, other = Near(radius=(0, 1, 1), brick=BRICK), Near(extent=(0, 0, 1), brick=BRICK)

    def parts(keep):
        return [
            ([1, 4], Part(near, Kind.MERGE, far[:, :, [1, 4]], lse[:, :, [1, 4]])),
            ([0], Part(near, Kind.ADD, far[:, :, [0]])),
            ([3], Part(other, Kind.EMIT_TAIL, keep=keep)),
            ([2], Part(other)),
        ]

    def kept(name):
        return lambda value, value_lse: left.__setitem__(name, (value.clone(), value_lse.clone()))

    together, alone = torch.zeros_like(q), torch.zeros_like(q)
    block_heads.attend(tokens, parts(kept("together")), together)
    for group in parts(kept("alone")):
        block_heads.attend(tokens, [group], alone)
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(left["together"], left["alone"])
    assert not together[:, :, 5].any() and together[:, :, :5].abs().amin(dim=(0, 1, 3)).max() > 0


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_full_through_a_backend_is_full_attention(backend):
    mask = torch.rand(2, 1, 1, 64, generator=torch.Generator().manual_seed(3)) < 0.7
    visit = make_visit(mask=mask)
    one = Full(backend)
    close(one.attend(visit), written_out(visit, mask))
    assert not one.exact and method_name(one) == f"full_{backend}"
    assert Full().exact and method_name(Full()) == "full"


def test_full_names_the_backends_that_it_knows():
    with pytest.raises(ValueError, match=r'backend must be one of auto, cuda, .*; got "metal"'):
        Full("metal")


def test_full_through_a_backend_that_cannot_run_is_not_silent():
    with pytest.raises(Unmet, match="cannot run"):
        Full("triton").attend(make_visit())


@pytest.mark.parametrize(("limit", "slower"), [(0.1, True), (1.0, False), (None, False)])
def test_lists_too_long_for_the_backend_are_refused_as_slower(limit, slower, monkeypatch):
    monkeypatch.setattr(break_even, "density", lambda *given: limit)
    visit, one = make_visit(), Brick((0, 0, 1), BRICK)
    if not slower:
        assert one.attend(visit).shape == visit.q.shape
        return
    with pytest.raises(Slower, match=r"is slower than dense here: backend .* breaks even at 0.10"):
        one.attend(visit)
