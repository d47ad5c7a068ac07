"""The profile file: what is saved is loaded, and nothing damaged or foreign is used."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import farkv
from farkv.calibrate.profile import FORMAT, Profile, make_profile
from farkv.calibrate.tensor_file import hash_around, pack_tensors, unpack_tensors
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


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    """Change what a profile holds, and write it with a digest that matches."""
    tensors, metadata = unpack_tensors(path.read_bytes(), FORMAT)
    change(tensors, metadata)
    path.write_bytes(pack_tensors(tensors, metadata))


def test_curves_that_do_not_fit_are_refused(made: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.safetensors"
    Profile(WHO, made.tensors, measured=make_curves()).save(path)
    rewrite(path, lambda tensors, metadata: metadata.update(curves="{"))
    with pytest.raises(ProfileError, match=r"profile\.safetensors: curves"):
        Profile.load(path)
    rewrite(path, lambda tensors, metadata: metadata.update(curves=make_curves(layers=2).notes))
    with pytest.raises(ProfileError, match="expected finite gains"):
        Profile.load(path)
    rewrite(path, lambda tensors, metadata: metadata.pop("curves"))
    with pytest.raises(ProfileError, match=r"expected tensors layer\.N"):
        Profile.load(path)


def test_a_profile_without_a_digest_is_refused_with_the_remedy(made: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.safetensors"
    for name, said in (("farkv-profile-1", "expected format farkv-profile-2"), (FORMAT, "expected one digest, got 0")):
        save_file(made.tensors, path, metadata={"format": name, "identity": "{}"})
        with pytest.raises(ProfileError, match=said + ".*create a new one: farkv profile"):
            Profile.load(path)


def test_no_bit_of_a_profile_can_be_flipped(made: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.safetensors"
    Profile(WHO, made.tensors, measured=make_curves(2)).save(path)
    whole = path.read_bytes()
    rng = random.Random(0)
    header = range(8 * (8 + int.from_bytes(whole[:8], "little")))
    for bit in (*rng.sample(header, 150), *rng.sample(range(8 * len(whole)), 50)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ProfileError, match="create a new one"):
            Profile.load(path)


def test_every_flipped_exponent_is_refused(made: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.safetensors"
    made.save(path)
    whole = path.read_bytes()
    begin, rng = 8 + int.from_bytes(whole[:8], "little"), random.Random(1)
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[begin + 4 * rng.randrange((len(whole) - begin) // 4) + 3] ^= 1 << rng.randrange(7)
        path.write_bytes(damaged)
        with pytest.raises(ProfileError, match="digest does not match"):
            Profile.load(path)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("svd", lambda t: t.double(), "expected svd of float32"),
        ("svd", lambda t: t[..., :-1].contiguous(), "expected svd of"),
        ("svd", lambda t: t * 2, "svd are no change of basis"),
        ("svd", lambda t: t.fill_(torch.nan), "finite numbers in svd"),
        ("query", lambda t: t[..., :4].contiguous(), "expected query of float32"),
        ("query", lambda t: t * 1.001, "query and key are no change of basis"),
        ("key", lambda t: t.squeeze(0), "expected key of float32"),
        ("mean", lambda t: t.fill_(torch.inf), "finite numbers in mean"),
        ("mean", lambda t: t.half(), "expected mean of float32"),
        ("mean", None, "lacks mean"),
    ],
)
def test_what_no_skew_can_be_is_refused_even_where_its_digest_matches(
    made: Profile, tmp_path: Path, name: str, change: Any, said: str
) -> None:
    path, full = tmp_path / "profile.safetensors", f"layer.3.{name}"
    made.save(path)

    def damage(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        tensor = tensors.pop(full)
        if change is not None:
            tensors[full] = change(tensor)

    rewrite(path, damage)
    with pytest.raises(ProfileError, match=f"layer 3: .*{said}|layer 3: {said}") as error:
        Profile.load(path)
    assert str(path) in str(error.value)


def test_unknown_names_are_refused(made: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.safetensors"
    for name in ("layer.03.svd", "layer.0.more", "a", "layer.-1.svd", "curves.keep"):
        with pytest.raises(ProfileError, match="expected tensors layer"):
            Profile(WHO, {**made.tensors, name: torch.zeros(2)})
    made.save(path)
    rewrite(path, lambda tensors, metadata: metadata.update(more="x"))
    with pytest.raises(ProfileError, match="expected no more than"):
        Profile.load(path)


@pytest.mark.parametrize(
    "identity", ["[]", "{", '{"layers": 2}', '{"a": "b", "a": "c"}', '{"a": NaN}', '{"a": "\\ud800"}']
)
def test_an_identity_that_is_none_is_refused(made: Profile, tmp_path: Path, identity: str) -> None:
    path = tmp_path / "profile.safetensors"
    made.save(path)
    rewrite(path, lambda tensors, metadata: metadata.update(identity=identity))
    with pytest.raises(ProfileError, match="create a new one"):
        Profile.load(path)


def test_a_header_that_claims_more_than_there_is_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    path, n = tmp_path / "profile.safetensors", 2**42
    tensor = {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]}
    head = {"__metadata__": {"format": FORMAT, "digest": "0" * 32, "identity": "{}"}, "layer.0.svd": tensor}
    for text in (json.dumps(head, separators=(",", ":")), "[" * 100_000, '{"a":' * 50_000, "{}", "[]", "1", "null"):
        raw = len(text).to_bytes(8, "little") + text.encode()
        if (at := raw.find(b'"digest":"') + 10) > 9:
            raw = raw[:at] + hash_around(raw, at, at + 32) + raw[at + 32 :]
        path.write_bytes(raw)
        with pytest.raises(ProfileError, match="create a new one"):
            Profile.load(path)
    for claimed in (0, 1, 2**40, 2**64 - 1):
        path.write_bytes(claimed.to_bytes(8, "little") + b"{}")
        with pytest.raises(ProfileError, match="expected a header"):
            Profile.load(path)
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ProfileError, match="expected at most"):
        Profile.load(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(ProfileError, match="expected a file"):
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
    for nothing in (tmp_path / "none", tmp_path):
        with pytest.raises(ProfileError, match="cannot be read"):
            Profile.load(nothing)


def test_moments_that_are_not_finite_are_refused() -> None:
    keys = torch.randn(1, 2, 9, 8)
    keys[0, 0, 0, 0] = torch.inf
    gram = measure_gram(torch.randn(1, 2, 9, 8), keys, None)
    with pytest.raises(ProfileError, match="layer 0: its queries or keys are not finite"):
        make_profile({0: gram}, WHO)


def test_profile_is_public() -> None:
    assert farkv.Profile is Profile
