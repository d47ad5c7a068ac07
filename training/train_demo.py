"""Train the demo model from nothing on both cores of a small machine.

    python training/train_demo.py --out runs/demo --minutes 82   # start, or go on from last.pt
    python training/train_demo.py --out runs/demo --export       # only write the fp16 weights

In: the standard library's sources. Out: checkpoints, a JSON line per report in `log.jsonl`, and at
the end `src/farkv/demo/model/`. The curriculum grows the length from 128 to 8192 tokens; a phase
ends when its recall is good or its share of the minutes is spent. Matrices learn by Muon, the rest
by AdamW. Two workers of one thread each share every batch; worker 0's clock decides for both.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from circuits import set_circuits
from corpus import collect_words, read_stdlib
from forward import DTYPE, run_model
from muon import BatchedMuon
from prompts import Filler, answer_prompts, draw_prompt
from safetensors.torch import save_file
from samples import ANSWER, COPY, TEXT, Sampler, encode_lines
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from farkv.demo.recall import TEST_WORDS

PACKAGE = Path(__file__).parent.parent / "src/farkv/demo/model"
WARM_UP = 0.3e6  # tokens
HOLD = 0.5  # share of the minutes at the full rate, before it falls linearly


@dataclass(frozen=True)
class Phase:
    """One stage: it ends at the share `until` of the minutes, or when recall reaches `enough`."""

    length: int
    until: float
    least: float
    enough: float
    mix: dict[str, float]
    sparse: float
    chains: float


def mix(copy: float, recall: float, code: float) -> dict[str, float]:
    return {"copy": copy, "recall": recall, "code": code}


PHASES = (
    Phase(128, 0.08, 0.5e6, 0.80, mix(0.3, 0.6, 0.1), 0.1, 0.0),
    Phase(256, 0.16, 0.8e6, 0.93, mix(0.1, 0.75, 0.15), 0.3, 0.05),
    Phase(512, 0.28, 1.0e6, 0.94, mix(0.07, 0.75, 0.18), 0.5, 0.1),
    Phase(1024, 0.34, 2.0e6, 0.97, mix(0.04, 0.78, 0.18), 0.75, 0.1),
    Phase(2048, 0.53, 2.0e6, 0.999, mix(0.02, 0.80, 0.18), 0.85, 0.15),
    Phase(4096, 0.76, 2.0e6, 0.999, mix(0.02, 0.80, 0.18), 0.9, 0.15),
    Phase(8192, 1.0, 1.0e6, 1.0, mix(0.02, 0.80, 0.18), 0.9, 0.15),
)


def make_config(vocabulary: int, theta: float = 1e7) -> LlamaConfig:
    """Return the demo model's shape: 8 layers, width 128, 4 query and 2 KV heads of 32."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=448,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


class Optimizers:
    """Muon on the matrices inside the blocks, AdamW on embeddings and norms; one rate factor."""

    def __init__(self, model: LlamaForCausalLM, muon_rate: float, adam_rate: float):
        inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
        ids = {id(p) for p in inner}
        rest = [p for p in model.parameters() if id(p) not in ids]
        adam = torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.all = [adam, BatchedMuon(inner, lr=muon_rate)]
        self.rates = [adam_rate, muon_rate]

    def step(self, factor: float) -> None:
        for optimizer, rate in zip(self.all, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def compute_loss(model, tokens: torch.Tensor, kinds: torch.Tensor, text_share: float):
    """Return the loss (answers whole, text thinned out) and sums for the report."""
    hidden = run_model(model, tokens)[:, :-1]
    goal, kind = tokens[:, 1:], kinds[:, 1:]
    thin = torch.rand(kind.shape) < text_share
    begins = (kind == ANSWER) & (kinds[:, :-1] != ANSWER)
    chosen = (kind == ANSWER) | (kind == COPY) | ((kind == TEXT) & thin)
    logits = (hidden[chosen] @ model.lm_head.weight.to(DTYPE).T).float()
    goal, kind = goal[chosen], kind[chosen]
    each = torch.nn.functional.cross_entropy(logits, goal, reduction="none")
    right = logits.argmax(-1) == goal
    loss, report = 0.0, {}
    for name, which, weight in (("answer", ANSWER, 1.0), ("copy", COPY, 0.5), ("text", TEXT, 0.5)):
        here = kind == which
        n = int(here.sum())
        if n:
            loss = loss + weight * each[here].mean()
        report[name] = (each[here].sum().item(), right[here].sum().item(), n)
    report["whole"] = (0.0, *count_whole(begins[chosen][kind == ANSWER], right[kind == ANSWER]))
    return loss, report


def count_whole(begins: torch.Tensor, right: torch.Tensor) -> tuple[int, int]:
    """Return how many answers have every token right, and how many there are; `begins` marks first tokens."""
    answer = begins.long().cumsum(0) - 1
    n = int(begins.sum())
    wrong = torch.zeros(n, dtype=torch.long).index_add_(0, answer, (~right).long())
    return int((wrong == 0).sum()), n


class Tally:
    """Adds up the reports of steps until they are written."""

    def __init__(self):
        self.sums: dict[str, list[float]] = {}

    def add(self, report: dict) -> None:
        for name, values in report.items():
            old = self.sums.setdefault(name, [0.0, 0.0, 0.0])
            self.sums[name] = [a + b for a, b in zip(old, values, strict=True)]

    def get(self, name: str, what: int) -> float:
        return round(self.sums[name][what] / max(1, self.sums[name][2]), 4)


class Run:
    """A training run that can stop anywhere and go on from its last checkpoint."""

    phases = PHASES
    folder = PACKAGE  # what `export` writes

    def __init__(self, args: argparse.Namespace, rank: int = 0):
        self.args, self.rank, self.out = args, rank, Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = Tokenizer.from_file(str(PACKAGE / "tokenizer.json"))
        torch.manual_seed(args.seed)
        self.model = LlamaForCausalLM(make_config(self.tokenizer.get_vocab_size(), args.theta))
        if not args.plain:
            set_circuits(self.model)
        self.optimizers = Optimizers(self.model, args.muon, args.adam)
        self.phase, self.seen, self.total, self.seconds = 0, 0, 0, 0.0
        if (self.out / "last.pt").exists():
            state = torch.load(self.out / "last.pt", weights_only=True)
            self.model.load_state_dict(state["model"])
            for o, s in zip(self.optimizers.all, state["optimizers"], strict=True):
                o.load_state_dict(s)
            self.phase, self.seen, self.total, self.seconds = state["at"]

    def read_data(self) -> None:
        """Tokenise the library (kept in the run's folder) and the reports' held-out filler."""
        files = read_stdlib(held_out=False)
        words = collect_words(files, set(TEST_WORDS))
        lines = encode_lines(self.tokenizer, files, self.out / "tokens.npz")
        # Neither a resumed run nor the other worker may draw the same samples.
        seed = self.args.seed + 2 * self.total + self.rank
        torch.manual_seed(seed)
        self.sampler = Sampler(self.tokenizer, lines, words, seed)
        self.filler = Filler(self.tokenizer, read_stdlib(held_out=True))

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers.all],
            "at": (self.phase, self.seen, self.total, self.seconds),
        }
        torch.save(state, self.out / "last.tmp")
        (self.out / "last.tmp").replace(self.out / "last.pt")

    def rate_factor(self, share: float) -> float:
        """Warm up over the first tokens, hold, and fall linearly with the wall clock."""
        down = max(0.02, (1 - share) / (1 - HOLD))
        return min(1.0, self.total / WARM_UP + 0.01, down)

    def step(self, phase: Phase, share: float) -> dict:
        """Draw one batch and learn from it."""
        per_step = 2048 if phase.length <= 128 else 4096 if phase.length <= 1024 else 8192
        per_step = max(per_step, phase.length * self.args.workers)
        length = max(64, phase.length // self.draw_divisor(phase, per_step))
        rows = max(1, per_step // length // self.args.workers)
        batch = self.sampler.make_batch(rows, length, phase.mix, phase.chains, phase.sparse)
        tokens, kinds = map(torch.from_numpy, batch)
        loss, report = compute_loss(self.model, tokens, kinds, 0.3)
        loss.backward()
        self.average_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizers.step(self.rate_factor(share))
        self.seen += tokens.numel() * self.args.workers
        self.total += tokens.numel() * self.args.workers
        return report

    def draw_divisor(self, phase: Phase, per_step: int) -> int:
        """Make a fifth of the batches 4 times shorter, from 2048 on another fifth 2 times."""
        turn = self.total // per_step % 5  # the same on all workers
        return 4 if turn == 0 else 2 if turn == 2 and phase.length >= 2048 else 1

    def average_gradients(self) -> None:
        """Make every worker's gradients the mean over the workers."""
        if self.args.workers == 1:
            return
        grads = [p.grad for p in self.model.parameters()]
        flat = torch.cat([g.view(-1) for g in grads])
        dist.all_reduce(flat)
        flat /= self.args.workers
        for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))

    def agree(self, *values: float) -> list[float]:
        """Return worker 0's values: its clock decides for all."""
        if self.args.workers == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(shared, 0)
        return shared.tolist()

    def test(self, n: int = 24) -> dict[str, float]:
        """Ask one question each on held-out filler, at this phase's length."""
        length = self.phases[self.phase].length
        facts = max(4, min(length // 100, 40))
        prompts = [draw_prompt(self.filler, length, facts, 77_000 + i) for i in range(n)]
        right = answer_prompts(self.model, prompts, max(1, 8192 // length))
        return {f"recall_{length}": round(sum(right) / n, 3)}

    def report(self, tally: Tally, share: float, more: dict) -> float:
        row = {
            "length": self.phases[self.phase].length,
            "total": self.total,
            "whole": tally.get("whole", 1),
            "digit": tally.get("answer", 1),
            "copy": tally.get("copy", 1),
            "answer_loss": tally.get("answer", 0),
            "text_loss": tally.get("text", 0),
            "factor": round(self.rate_factor(share), 3),
            "seconds": round(self.seconds),
            "rate": round(self.total / max(self.seconds, 1)),
        } | more
        print(json.dumps(row), flush=True)
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        return row["whole"]

    def train(self) -> None:
        """Go through the phases until the minutes are spent."""
        limit, recall, since, tally = 60 * self.args.minutes, 0.0, time.time(), Tally()
        tested = self.seconds
        while True:
            self.seconds, recall = self.agree(self.seconds, recall)
            phase, share = self.phases[self.phase], self.seconds / limit
            if share >= 1:
                return
            good = self.seen > phase.least and recall >= phase.enough
            if (good or share > phase.until) and self.phase + 1 < len(self.phases):
                self.phase, self.seen, recall = self.phase + 1, 0, 0.0
                continue
            tally.add(self.step(phase, share))
            now = time.time()
            if self.rank == 0 and now - since > self.args.every:
                self.seconds += now - since
                since, more = now, {}
                if self.seconds - tested > self.args.test:
                    tested, more = self.seconds, self.test()
                recall, tally = self.report(tally, share, more), Tally()
                self.save()

    def export(self) -> None:
        """Write config and fp16 weights into the package, each file whole or not at all."""
        self.folder.mkdir(exist_ok=True)
        weights = {
            name: value.half().contiguous()
            for name, value in self.model.state_dict().items()
            if name != "lm_head.weight"
        }
        save_file(weights, self.folder / "model.tmp", metadata={"format": "pt"})
        os.replace(self.folder / "model.tmp", self.folder / "model.safetensors")
        os.chmod(self.folder / "model.safetensors", 0o644)
        config = self.model.config.to_diff_dict() | {
            "dtype": "float16",
            "architectures": ["LlamaForCausalLM"],
        }
        (self.folder / "config.tmp").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        os.replace(self.folder / "config.tmp", self.folder / "config.json")


def work(rank: int, args: argparse.Namespace, kind: type[Run]) -> None:
    """Run one worker; each has its own samples and one thread, and all have the same weights."""
    torch.set_num_threads(1)
    if args.workers > 1:
        where = f"tcp://127.0.0.1:{args.port}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=args.workers)
    run = kind(args, rank)
    if rank == 0:
        run.read_data()
    run.agree(0.0)
    if rank:
        run.read_data()
    run.train()
    if rank == 0:
        run.save()
        run.export()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of checkpoints and log")
    parser.add_argument("--minutes", type=float, default=90, help="wall time of the whole run")
    parser.add_argument("--muon", type=float, default=0.01, help="Muon's rate")
    parser.add_argument("--adam", type=float, default=1.5e-3, help="AdamW's rate")
    parser.add_argument("--theta", type=float, default=1e7, help="base of the rotary positions")
    parser.add_argument("--plain", action="store_true", help="start from random values only")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--port", type=int, default=29517, help="where the workers meet")
    parser.add_argument("--every", type=float, default=30, help="seconds between reports and checkpoints")
    parser.add_argument("--test", type=float, default=480, help="seconds between tests with prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", action="store_true", help="only write the package's weights")
    return parser.parse_args()


def start(args: argparse.Namespace, kind: type[Run]) -> None:
    """Export, or train with as many workers as wanted."""
    if args.export:
        kind(args).export()
    elif args.workers == 1:
        work(0, args, kind)
    else:
        torch.multiprocessing.spawn(work, (args, kind), args.workers)


def main() -> None:
    start(parse_arguments(), Run)


if __name__ == "__main__":
    main()
