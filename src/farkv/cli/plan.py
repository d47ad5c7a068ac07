"""`farkv plan`: divide a budget among the layers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from farkv.cli.options import JsonOption, ModelOption
from farkv.cli.terminal import err, say
from farkv.config import LEVERS, Lever, parse_bytes
from farkv.errors import ConfigError
from farkv.files import write_file
from farkv.quote import quote
from farkv.show import draw_plan, draw_proposal

RULES = ("xkv", "loss", "maxmin", "pyramid", "uniform", "paper")


def plan_layers(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the plan.")] = Path("plan.json"),
    profile: Annotated[str | None, typer.Option(help="Profile with curves. Default: the one beside the model.")] = None,
    model: ModelOption = "demo",
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Records per KV head, summed over layers, not counting the window.")
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="Fraction of the whole KV cache, e.g. 0.3.")] = None,
    size: Annotated[str | None, typer.Option("--bytes", help="KV bytes of one sequence, e.g. 512MiB.")] = None,
    retention: Annotated[
        float | None, typer.Option(help="Attention mass to retain, mean over layers, e.g. 0.9.")
    ] = None,
    confidence: Annotated[
        float,
        typer.Option(min=0.0, max=0.999, help="Fraction of unseen prompts that reach --retention; 0: on average."),
    ] = 0.9,
    context: Annotated[
        int | None, typer.Option(min=1, help="Context length that --tokens or --bytes is for (default: the profile's).")
    ] = None,
    lever: Annotated[
        list[str] | None,
        typer.Option(help="Lever to plan: keep, near, fetch; may be repeated. Default: all."),
    ] = None,
    rule: Annotated[str, typer.Option(help=", ".join(RULES) + ".")] = "xkv",
    floor: Annotated[float, typer.Option(min=0.0, help="Minimum share of each layer.")] = 0.0,
    weights: Annotated[
        str | None, typer.Option(help="Weight of each layer's retention, e.g. 1,1,4,1 (rule xkv).")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Existing plan to copy the other levers from.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot curves and shares, e.g. plan.png.")] = None,
    kvpress: Annotated[
        Path | None, typer.Option(help="Also write the keep lever for kvpress's PerLayerCompressionPress.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    r"""Divide a budget among the layers, using the curves that `farkv profile` measured.

    Without a budget, the smallest one is proposed whose shares hold 90 % of the attention mass and, where that was
    measured, lose at most 0.1 nats per token.

    [bold]Examples[/bold]

      farkv plan

      farkv plan --ratio 0.3 -o plan.json --plot plan.png

      farkv plan --profile qwen3.safetensors --retention 0.95 --lever keep

      farkv plan --ratio 0.3 --rule loss   (profile made with --losses)

      farkv plan --ratio 0.1 --lever fetch --base plan.json -o both.json
    """
    levers = tuple(lever) if lever else LEVERS
    for name in levers:
        if name not in LEVERS:
            raise ConfigError(f"--lever: expected one of {', '.join(LEVERS)}, got {name!r}")
    if rule not in RULES:
        raise ConfigError(f"--rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if kvpress is not None and "keep" not in levers and base is None:
        raise ConfigError("--kvpress: writes the keep lever, which this plan does not have; add --lever keep")
    n_bytes = parse_bytes(size, "--bytes")
    from farkv.calibrate.plan import Plan
    from farkv.calibrate.planning import PlanBudget, Sharing, make_plan
    from farkv.calibrate.profile import Profile
    from farkv.calibrate.proposing import plan_proposal, propose_budget

    path = profile or find_profile_of(model)
    loaded = Profile.load(path)
    budget = PlanBudget(tokens, ratio, n_bytes, retention, confidence, context)
    names: tuple[Lever, ...] = tuple(name for name in LEVERS if name in levers)
    sharing, copied = Sharing(rule, parse_weights(weights, rule), floor), Plan.load(base) if base else None
    proposal = propose_budget(loaded, names, sharing) if (tokens, ratio, n_bytes, retention) == (None,) * 4 else None
    if proposal is None:
        made = make_plan(loaded, budget, names, sharing, copied)
    else:
        made = plan_proposal(loaded, proposal, sharing, copied)
    made.save(out)
    if plot is not None:
        from farkv.plot import plot_plan

        plot_plan(made, loaded.curves(), plot, name=str(path) if profile else model)
    if kvpress is not None:
        ratios = json.dumps({"compression_ratios": made.to_kvpress()}) + "\n"
        write_file(kvpress, ratios.encode(), "file")
    if as_json:
        proposed = {} if proposal is None else {"proposal": proposal.to_dict()}
        typer.echo(json.dumps({"out": str(out), **proposed, **made.to_dict()}))
    else:
        if proposal is not None:
            err.print(draw_proposal(proposal))
        err.print(draw_plan(made))
        say(f"wrote {', '.join(quote(p) for p in (out, plot, kvpress) if p)}")


def parse_weights(text: str | None, rule: str) -> tuple[float, ...] | None:
    """Parse the layers' weights.

    Raises:
        ConfigError: one is not a number, or the rule does not use weights.
    """
    if text is None:
        return None
    if rule != "xkv":
        raise ConfigError(f"--weights: requires --rule xkv, got --rule {rule}")
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--weights: expected comma-separated numbers, got {text!r}") from error
    if not all(map(math.isfinite, found)):
        raise ConfigError(f"--weights: expected finite numbers, got {text!r}")
    return found


def find_profile_of(model: str) -> Path:
    """Return the path of the profile in the model's folder, or beside its GGUF file.

    Raises:
        ConfigError: there is none.
    """
    from farkv.calibrate.profile import find_beside
    from farkv.demo import MODEL_PATH

    path = find_beside(MODEL_PATH if model == "demo" else model)
    if not path.is_file():
        raise ConfigError(
            f"--profile: {quote(path)} is not there; make it: farkv profile --model {quote(model)} --out {quote(path)}"
        )
    return path
