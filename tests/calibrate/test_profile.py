"""The profile file: what is saved is loaded, and nothing damaged or foreign is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import farkv
from farkv.calibrate.profile import Profile, make_profile
from farkv.errors import ProfileError
from farkv.math.skew import measure_gram
from tests.calibrate.test_curves import make_curves

WHO = {"model_type": "tiny", "layers": "2", "weights": "abc"}


@pytest.fixture
def made() -> Profile:
    grams = {i: measure_gram(torch.randn(2, 4, 30, 8), torch.randn(2, 2, 30, 8), None).sum_batch() for i in (0, 3)}
    return make_profile(grams, WHO)


def test_a_saved_profile_comes_back(made: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.safetensors"
    made.save(path)
    made.save(path)
    loaded = Profile.load(path)
    assert loaded.identity == WHO
    assert loaded.tensors.keys() == made.tensors.keys()
    assert all(torch.equal(loaded.tensors[n], made.tensors[n]) for n in made.tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["profile.safetensors"]
    assert [t.shape for t in loaded.bilinear(3)] == [(1, 2, 8, 8), (1, 2, 8, 8), (1, 2, 1, 8)]
    assert loaded.svd(0).shape == (1, 2, 8, 8)


@pytest.mark.parametrize("skew", [True, False])
def test_curves_come_back(made: Profile, tmp_path: Path, skew: bool) -> None:
    path, curves = tmp_path / "profile.safetensors", make_curves()
    profile = Profile(WHO, made.tensors if skew else {}, measured=curves)
    profile.save(path)
    loaded = Profile.load(path)
    assert loaded.has_skew is skew
    assert loaded.tensors.keys() == profile.tensors.keys()
    again = loaded.curves()
    assert (again.layers, again.settings) == (curves.layers, curves.settings)
    assert torch.allclose(again.keep, curves.keep, atol=1e-4)
    assert torch.allclose(again.mean("spread"), curves.mean("spread"), atol=1e-4)
    loaded.save(tmp_path / "second")
    assert torch.allclose(Profile.load(tmp_path / "second").curves().keep, again.keep, atol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["profile.safetensors", "second"]


def test_a_profile_without_curves_says_so(made: Profile, tmp_path: Path) -> None:
    made.save(tmp_path / "old")
    with pytest.raises(ProfileError, match="create a new one"):
        Profile.load(tmp_path / "old").curves()
    assert made.has_skew


def test_curves_that_do_not_fit_are_refused(made: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.safetensors"
    Profile(WHO, made.tensors, measured=make_curves()).save(path)
    metadata = {"format": "farkv-profile-1", "identity": "{}"}
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(ProfileError, match=r"profile\.safetensors: curves"):
        Profile.load(path)
    notes = make_curves(layers=2).notes
    save_file(load_file(path), path, metadata={**metadata, "curves": notes})
    with pytest.raises(ProfileError, match="expected finite gains"):
        Profile.load(path)


def test_missing_layers_and_other_models_are_named(made: Profile) -> None:
    with pytest.raises(ProfileError, match="lacks layer 1"):
        made.svd(1)
    made.check(WHO)
    with pytest.raises(ProfileError, match="weights is 'abc', the model's is 'xyz'"):
        made.check({**WHO, "weights": "xyz"})


@pytest.mark.parametrize("keep", [0, 4, 8, 40, 200, -1])
def test_a_torn_file_is_refused(made: Profile, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "profile.safetensors"
    made.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ProfileError, match="cannot be read"):
        Profile.load(path)


def test_files_that_are_no_profile_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content in (b"hello", b"\xff" * 100, b"\x08\x00\x00\x00\x00\x00\x00\x00notajson"):
        path.write_bytes(content)
        with pytest.raises(ProfileError, match="cannot be read"):
            Profile.load(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ProfileError, match="expected format"):
        Profile.load(path)
    save_file({"a": torch.zeros(2)}, path, metadata={"format": "farkv-profile-1", "identity": "{"})
    with pytest.raises(ProfileError, match="cannot be read"):
        Profile.load(path)
    for nothing in (tmp_path / "none", tmp_path):
        with pytest.raises(ProfileError, match="cannot be read"):
            Profile.load(nothing)


def test_moments_that_are_not_finite_are_refused() -> None:
    keys = torch.randn(1, 2, 9, 8)
    keys[0, 0, 0, 0] = torch.inf
    gram = measure_gram(torch.randn(1, 2, 9, 8), keys, None)
    with pytest.raises((ProfileError, torch.linalg.LinAlgError)):
        make_profile({0: gram}, WHO)


def test_profile_is_public() -> None:
    assert farkv.Profile is Profile
