"""Point 5: profiles, plans and the calibration file are trusted only where they are what farkv measured or can use.

A small random model, its own profile and plan; one of them is damaged, then attached and generated with. Accepted
damage is wrong, whatever it does to the answer: nobody would notice.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from random_models import make_llama
from safetensors import safe_open
from safetensors.torch import save

import farkv
from attacks.base import Attack, Verdict
from farkv import FarKVError, InfiniGen, Plan
from farkv.calibrate.crossover import RecordShape, find_calibration_path, load_crossover, save_crossover
from farkv.calibrate.planning import PlanBudget, make_plan

Change = Callable[[random.Random, bytes], bytes]


@cache
def get_model() -> Any:
    return make_llama(256, layers=3, heads=4, kv_heads=2, hidden=32, mlp=32, vocabulary=64)


@cache
def get_files() -> tuple[bytes, bytes]:
    """Return the bytes of the model's profile and plan, as the code under attack writes them."""
    prompts = [torch.randint(64, (n,), generator=torch.Generator().manual_seed(n)) for n in (60, 90)]
    made = farkv.profile(get_model(), prompts, losses=1)
    with tempfile.TemporaryDirectory() as folder:
        made.save(Path(folder) / "profile.safetensors")
        make_plan(made, PlanBudget(ratio=0.5), ("fetch",)).save(Path(folder) / "plan.json")
        return (Path(folder) / "profile.safetensors").read_bytes(), (Path(folder) / "plan.json").read_bytes()


def judge(use: Callable[[Path], object], data: bytes, name: str, true: object = None) -> Verdict:
    """Say what came of using a file of these bytes; `true`, where it may be used: what it then must give."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        try:
            found = use(path)
        except FarKVError:
            return "refused"
        except Exception:
            return "wrong"
    return "right" if true is not None and found == true else "wrong"


def generate(path: Path) -> list[int]:
    """Attach the model with what lies beside its weights, which is this profile, and answer."""
    model, ids = get_model(), torch.arange(40)[None]
    model.config._name_or_path = str(path.parent)
    try:
        with farkv.attach(model, InfiniGen(fraction=0.3), near="1MiB") as far:
            return model.generate(ids, past_key_values=far.new_cache(), max_new_tokens=4, do_sample=False)[0].tolist()
    finally:
        model.config._name_or_path = ""


def attack_profile(change: Change) -> Callable[[random.Random], Verdict]:
    return lambda rng: judge(generate, change(rng, get_files()[0]), "profile.safetensors")


# --- damage ---------------------------------------------------------------------------------------------------


def find_data(raw: bytes) -> int:
    return 8 + int.from_bytes(raw[:8], "little")


def flip_exponent(rng: random.Random, raw: bytes) -> bytes:
    """Flip one bit of the exponent of one number of a skew."""
    head = json.loads(raw[8 : find_data(raw)])
    skews = [entry["data_offsets"] for name, entry in head.items() if name.startswith("layer.")]
    start, stop = rng.choice(skews)
    damaged = bytearray(raw)
    damaged[find_data(raw) + start + 4 * rng.randrange((stop - start) // 4) + 3] ^= 1 << rng.randrange(7)
    return bytes(damaged)


def damage_file(rng: random.Random, raw: bytes) -> bytes:
    """Flip a bit of header or data, cut the file, append to it, or let its header claim much."""
    damaged, kind = bytearray(raw), rng.randrange(5)
    if kind == 0:
        damaged[rng.randrange(find_data(raw))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        damaged[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del damaged[rng.randrange(len(raw)) :]
    elif kind == 3:
        damaged += rng.randbytes(rng.randrange(1, 100))
    else:
        damaged[:8] = rng.choice([0, 1, 2**20, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little")
    return bytes(damaged)


def forge_content(rng: random.Random, raw: bytes) -> bytes:
    """Change what a profile holds and write it whole, with a digest that matches where there is one."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "p").write_bytes(raw)
        with safe_open(str(Path(folder) / "p"), "pt") as file:
            about, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}
    name = f"layer.{rng.randrange(3)}.{rng.choice(['query', 'key', 'mean', 'svd'])}"
    changes = [
        lambda t: t[..., : t.shape[-1] // 2].contiguous(), lambda t: t.double(), lambda t: t.int(), lambda t: t[0],
        lambda t: t.repeat(1, 2, 1, 1), lambda t: torch.full_like(t, rng.choice([torch.nan, torch.inf, 3e38])),
        lambda t: torch.cat([t, t], -1), lambda t: t[:, :1].contiguous(), lambda t: torch.zeros(0), None,
    ]  # fmt: skip
    change = rng.choice(changes)
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor)
    if "digest" not in about:
        return save(tensors, about)
    from farkv.calibrate.tensor_file import pack_tensors

    return pack_tensors(tensors, about)


# --- JSON -----------------------------------------------------------------------------------------------------

ODD = [
    "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e308", "9" * 400, "9" * 5000, "-1", "true", "false", "null",
    '"0.5"', '"x"', "[]", "{}", "[0.5]", '"\\ud800"', "[" * 5000 + "]" * 5000, "[" * 100_000, "5e-324x", "0x10", "",
]  # fmt: skip


def list_places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return where every value of a JSON document stands."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [path, *(place for key, inner in pairs for place in list_places(inner, (*path, key)))]


def damage_json(rng: random.Random, raw: bytes) -> bytes:
    """Put something odd in a value's place, double a key, or damage the bytes."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice([b"\xef\xbb\xbf" + raw, raw.decode().encode("utf-16"), raw + b"\xff", raw + raw, b"\0" + raw])
    if kind == 1:
        return raw[: rng.randrange(len(raw) - 2)]
    document = json.loads(raw)
    places = [place for place in list_places(document) if place]
    if kind == 2:
        key = rng.choice(list(document))
        return raw.replace(b"{", b"{" + json.dumps({key: document[key]}).encode()[1:-1] + b", ", 1)
    place = rng.choice(places)
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = "@here@"
    return json.dumps(document).replace('"@here@"', rng.choice(ODD), 1).encode()


def use_plan(path: Path) -> list[Any]:
    """Read a plan, use it, and say what it means."""
    plan, model = Plan.load(path), get_model()
    with farkv.attach(model, InfiniGen(), plan=plan, profile=False) as far:
        model.generate(torch.arange(40)[None], past_key_values=far.new_cache(), max_new_tokens=4, do_sample=False)
    plan.save(path)
    # Whoever reads it next, in another language too, must read the same.
    json.loads(path.read_bytes(), parse_constant=lambda name: 1 / 0)
    return [plan.layers, plan.get("fetch").shares, plan.identity]


def attack_plan(rng: random.Random) -> Verdict:
    raw = get_files()[1]
    true = json.loads(raw)
    same = [tuple(true["layers"]), tuple(true["levers"]["fetch"]["shares"]), true["identity"]]
    return judge(use_plan, damage_json(rng, raw), "plan.json", same)


SHAPE = RecordShape(2, 8, 2, "float32")


def use_calibration(path: Path) -> object:
    os.environ["FARKV_CACHE_DIR"] = str(path.parent)
    try:
        found = load_crossover("k", SHAPE)
        save_crossover("other", SHAPE, 5, {})
        json.loads(find_calibration_path().read_bytes(), parse_constant=lambda name: 1 / 0)
        return found
    finally:
        del os.environ["FARKV_CACHE_DIR"]


def attack_calibration(rng: random.Random) -> Verdict:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FARKV_CACHE_DIR"] = folder
        raw = save_crossover("k", SHAPE, 2048, {"seconds": 0.5}).read_bytes()
        del os.environ["FARKV_CACHE_DIR"]
    return judge(use_calibration, damage_json(rng, raw), "calibration.json", 2048)


ATTACKS = {
    "exponent": Attack(5, "one bit of an exponent of a profile's skews is flipped",
                       attack_profile(flip_exponent), 15, 150),
    "damage": Attack(5, "a profile's bytes are flipped, cut, extended; lengths that claim terabytes",
                     attack_profile(damage_file), 15, 150),
    "forged": Attack(5, "a profile whose digest matches holds NaN, other shapes and types, or lacks a tensor",
                     attack_profile(forge_content), 10, 150),
    "plan": Attack(5, "NaN, huge numbers, deep JSON, other types, doubled keys or damage in a plan",
                   attack_plan, 15, 300),
    "calibration": Attack(5, "the same in the calibration file", attack_calibration, 20, 300),
}  # fmt: skip
