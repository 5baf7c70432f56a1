"""Weights beside a recipe: safetensors, beside it, with the right sha256; also from the Hub."""

import hashlib
from pathlib import Path

import pytest

from dit_accel.errors import RecipeError
from dit_accel.recipe import Recipe


@pytest.fixture
def saved(tmp_path) -> Recipe:
    """A recipe on disk with one file beside it."""
    (tmp_path / "router.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest().upper()
    (tmp_path / "recipe.toml").write_text(f'schema = 1\n[files]\nrouter.safetensors = "{digest}"\n')
    return Recipe.from_file(tmp_path / "recipe.toml")


def test_a_file_is_opened_when_its_sha256_is_right(saved, tmp_path):
    assert saved.open_file("router.safetensors") == tmp_path / "router.safetensors"


def test_a_changed_file_is_refused(saved, tmp_path):
    (tmp_path / "router.safetensors").write_bytes(b"Weights")
    with pytest.raises(
        RecipeError, match=r"recipe\.toml:3: \[files\] router\.safetensors has sha256 .* but the recipe"
    ):
        saved.open_file("router.safetensors")


def test_a_file_that_is_missing_or_not_listed_is_named(saved, tmp_path):
    with pytest.raises(RecipeError, match=r'lists no "rooter"; listed: router\.safetensors'):
        saved.open_file("rooter")
    (tmp_path / "router.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"is not at .*Put the file beside the recipe"):
        saved.open_file("router.safetensors")
    tables = {"schema": 1, "files": {"router.safetensors": "0" * 64}}
    with pytest.raises(RecipeError, match="came from no file"):
        Recipe.from_dict(tables).open_file("router.safetensors")


def test_a_link_out_of_the_folder_is_refused_even_with_the_right_sha256(saved, tmp_path):
    outside = tmp_path.parent / "outside.safetensors"
    outside.write_bytes(b"weights")
    (tmp_path / "router.safetensors").unlink()
    (tmp_path / "router.safetensors").symlink_to(outside)
    with pytest.raises(RecipeError, match="is a link out of the recipe's folder"):
        saved.open_file("router.safetensors")


def test_links_of_the_hub_cache_are_followed(saved, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name in ("recipe.toml", "router.safetensors"):
        (tmp_path / name).rename(blobs / name)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    recipe = Recipe.from_file(snapshot / "recipe.toml")
    assert recipe.open_file("router.safetensors").read_bytes() == b"weights"


def test_saving_copies_the_files_and_reads_back_equal(saved, tmp_path):
    target = saved.save(tmp_path / "new" / "folder" / "other.toml")
    again = Recipe.from_file(target)
    assert again == saved
    assert again.open_file("router.safetensors").parent == target.parent
    assert [path.suffix for path in sorted(target.parent.iterdir())] == [".toml", ".safetensors"]
    assert again.save(target) == target


def test_a_hub_recipe_comes_with_its_files_from_one_commit(saved, tmp_path, monkeypatch):
    commit = "c" * 40
    snapshot = tmp_path / "snapshots" / commit / "sub"
    saved.save(snapshot / "fast.toml")
    asked = []

    def hf_hub_download(repo_id, filename, revision=None):
        asked.append((repo_id, filename, revision))
        return str(snapshot.parent / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    recipe = Recipe.load("org/repo/sub/fast")
    assert recipe == saved
    assert recipe.name == "org/repo/sub/fast"
    assert asked == [("org/repo", "sub/fast.toml", None), ("org/repo", "sub/router.safetensors", commit)]
    (snapshot / "router.safetensors").write_bytes(b"changed")
    with pytest.raises(RecipeError, match=r"^hub:org/repo/sub/fast\.toml:\d+: .*sha256"):
        Recipe.from_hub("org/repo", "sub/fast.toml")
