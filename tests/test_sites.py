"""Patterns of recipes against the modules of denoisers."""

import pytest

from dit_accel.sites import Denoiser, Span, match_attention, match_span, unmatched


def wan(component: str = "transformer", blocks: int = 12) -> Denoiser:
    return Denoiser(
        component=component,
        self_attention={f"blocks.{i}.attn1": 4 for i in range(blocks)},
        cross_attention={f"blocks.{i}.attn2": 4 for i in range(blocks)},
        blocks=tuple(f"blocks.{i}" for i in range(blocks)),
    )


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("blocks.7.attn1", ["blocks.7.attn1"]),
        ("blocks.1.attn1", ["blocks.1.attn1"]),  # not blocks.10 or blocks.11
        ("blocks.0-2.attn1", ["blocks.0.attn1", "blocks.1.attn1", "blocks.2.attn1"]),
        ("blocks.9-11.attn2", ["blocks.9.attn2", "blocks.10.attn2", "blocks.11.attn2"]),
        ("blocks.10-40.attn1", ["blocks.10.attn1", "blocks.11.attn1"]),
        ("blocks.*.attn2", [f"blocks.{i}.attn2" for i in range(12)]),
        ("transformer.blocks.3.attn1", ["blocks.3.attn1"]),
        ("transformer_2.blocks.3.attn1", []),
        ("blocks.12.attn1", []),
        ("blocks.0.attn", []),
        ("blocks.0.attn11", []),
        ("blocks.0.ffn", []),
        ("blocks.0", []),
        ("block.0.attn1", []),
        ("transformer_blocks.0.attn1", []),
        ("blocks.0.attn1.to_q", []),
        ("", []),
    ],
)
def test_attention_patterns(pattern: str, expected: list[str]):
    assert match_attention(pattern, wan()) == expected


def test_the_star_is_every_attention_site():
    assert set(match_attention("*", wan(blocks=2))) == {
        f"blocks.{i}.{name}" for i in range(2) for name in ("attn1", "attn2")
    }


@pytest.mark.parametrize(
    ("pattern", "site", "blocks"),
    [
        ("blocks.3", "blocks.3", [3]),
        ("blocks.1-6", "blocks.1-6", [1, 2, 3, 4, 5, 6]),
        ("blocks.10-11", "blocks.10-11", [10, 11]),
        ("blocks.*", "blocks.*", list(range(12))),
        ("*", "*", list(range(12))),
        ("transformer.blocks.0-1", "blocks.0-1", [0, 1]),
    ],
)
def test_span_patterns(pattern: str, site: str, blocks: list[int]):
    assert match_span(pattern, wan()) == Span(site, tuple(f"blocks.{i}" for i in blocks))


@pytest.mark.parametrize(
    "pattern",
    [
        "blocks.12",
        "blocks.6-12",
        "transformer_2.blocks.1",
        "layers.1",
        "blocks.0.attn1",
        "blocks",
        "blocks.1-",
    ],
)
def test_no_span(pattern: str):
    """A span that runs past the last block is a mistake, not a shorter span."""
    assert match_span(pattern, wan()) is None


def test_a_prefix_chooses_the_second_denoiser():
    second = wan("transformer_2")
    assert match_attention("transformer_2.blocks.3.attn1", second) == ["blocks.3.attn1"]
    assert match_attention("transformer.blocks.3.attn1", second) == []
    assert match_attention("blocks.3.attn1", second) == ["blocks.3.attn1"]
    assert match_span("transformer_2.blocks.1-2", second) == Span("blocks.1-2", ("blocks.1", "blocks.2"))


def test_an_unknown_site_names_place_table_nearest_and_remedy():
    error = unmatched("blocks.3.attn", (wan(blocks=4),), "my.toml:12", "attention.both")
    text = str(error)
    assert text.startswith('my.toml:12: [attention.both] "blocks.3.attn" matches no site of this pipeline')
    assert "nearest: blocks.3.attn2, blocks.3.attn1" in text
    assert "Use the module path" in text


def test_all_attention_sites_with_their_heads():
    assert wan(blocks=1).attention == {"blocks.0.attn1": 4, "blocks.0.attn2": 4}
