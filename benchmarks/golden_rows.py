"""The configurations of `golden.py`; `means` names the facts that a row's receipt must show, or that it is refused."""

from __future__ import annotations

from typing import Any

from golden_models import Row
from golden_play import N_ASKED, NEW_TOKENS

from farkv.methods import H2O, XKV, Full, InfiniGen, LowBit, Oracle, Pages, PyramidKV, Random, SnapKV, Window

ATTACH = ("near", "host", "disk", "evict", "quant", "kernel")
GENERATE = ("prefill_chunk_size", "num_beams", "prompt_lookup_num_tokens")
DEFAULTS: dict[str, Any] = {"model": "llama", "way": "generate", "plan": {}, "profile": False}


def row(name: str, *methods: Any, means: str = "", **options: Any) -> Row:
    """Return a row; options are those of attach, new_cache and generate, and of `Row`.

    A cache is told its length and its batch unless `tokens=0` is given. `chunk` is the tokens of a pass of the prompt.
    """
    text = options.pop("batch", 1), options.pop("text", 320), options.pop("pad", 0)
    own = {key: options.pop(key, default) for key, default in DEFAULTS.items()}
    if "chunk" in options:
        options["prefill_chunk_size"] = options["chunk_tokens"] = options.pop("chunk")
    attach = {key: options.pop(key) for key in ATTACH if key in options}
    generate = {key: options.pop(key) for key in GENERATE if key in options}
    told = {} if own["way"] in ("resume", "lengthen", "save") else {"batch": text[0] * generate.get("num_beams", 1)}
    cache = {"tokens": text[1] + N_ASKED + NEW_TOKENS, **told, **options}
    return Row(name, methods, tuple(means.split()), text=text, attach=attach, cache=cache, generate=generate, **own)


OURS, OPEN, LEAN = InfiniGen(fraction=0.2), InfiniGen(fraction=0.2, top_up=0.0), InfiniGen(fraction=0.1)
PAPER, ORACLE, PAGES, LOWBIT = InfiniGen(paper=True, fraction=0.4), Oracle(fraction=0.2), Pages(), LowBit(fraction=0.2)
PADDED: dict[str, Any] = {"batch": 3, "pad": 90}
# Near memory for less than a layer of a longer text; for one of the usual text; for a recently used set besides.
TIGHT: dict[str, Any] = {"near": "150KiB", "text": 600, "chunk": 64}
NEAR, ROOMY = {"near": "140KiB"}, {"near": "260KiB"}
DISK: dict[str, Any] = {"disk": "4MiB", "host": "230KiB", "chunk": 64}
SPILL: dict[str, Any] = {"host": "200KiB", "chunk": 64}
KEEP, HELD, FETCH = (0.5, 0.2, 0.3, 0.4), (0.2, 0.1, 0.1, 0.2), (0.1, 0.3, 0.2, 0.2)
ALL, THREE = {"keep": KEEP, "near": HELD, "fetch": FETCH}, XKV(levers=("keep", "near", "fetch"))
HOLD = XKV(levers=("near", "fetch"))
POLICIES = ("fifo", "lru", "counter", "clock", "score")

IN_PLACE = (
    row("default/short", text=150, means="native"),
    row("default/grows", tokens=0, means="native fallback"),
    row("infinigen", OURS, means="sparse index native"),
    row("infinigen/alpha", InfiniGen(fraction=0.2, alpha=2.0), means="sparse index"),
    row("infinigen/top-p", InfiniGen(fraction=0.2, top_p=0.5), means="sparse index"),
    row("infinigen/columns-8bit", InfiniGen(fraction=0.1, columns=6, index_bits=8), means="sparse index"),
    row("infinigen/forced", InfiniGen(fraction=0.2, sinks=0, window=30), means="sparse index"),
    row("infinigen/young", InfiniGen(fraction=0.5), num_beams=2, text=8, tokens=0, means="sparse index fallback"),
    row("infinigen/all", InfiniGen(fraction=1.0), means="index"),
    row("infinigen/plain", OURS, kernel="plain", means="sparse index plain"),
    row("infinigen/native-all", InfiniGen(fraction=1.0), kernel="native", means="native"),
    row("infinigen/profile", OURS, profile=True, means="sparse index"),
    row("paper", PAPER, model="opt", means="sparse index"),
    row("paper/profile", PAPER, profile=True, means="sparse index"),
    row("full", Full(), means="plain"),
    row("full/native", Full(), kernel="native", means="native"),
    row("oracle", ORACLE, means="sparse"),
    row("window", Window(fraction=0.2, sinks=9), means="sparse"),
    row("random", Random(fraction=0.2, seed=5), means="sparse"),
    row("pages", PAGES, means="sparse index"),
    row("pages/small", Pages(fraction=0.3, page=5), kernel="plain", means="sparse index plain"),
    row("lowbit", LOWBIT, means="sparse index"),
    row("lowbit/4", LowBit(fraction=0.2, bits=4), means="sparse index native"),
    row("lowbit/4/plain", LowBit(fraction=0.2, bits=4), kernel="plain", means="sparse index plain"),
    row("snapkv/pool", SnapKV(fraction=0.3, window=8, pool=3), tokens=0, means="sparse evicted"),
    row("pyramidkv", PyramidKV(fraction=0.3), means="sparse evicted"),
    row("h2o", H2O(fraction=0.2), means="sparse evicted"),
    row("h2o/recent", H2O(fraction=0.3, recent=0.2), chunk=64, means="sparse evicted"),
    row("xkv", XKV(), means="evicted"),
    row("xkv/retention", XKV(retention=0.8), means="evicted"),
    row("xkv/tokens", XKV(tokens=200), means="evicted"),
    row("xkv/maxmin", XKV(fraction=0.3, rule="maxmin"), means="evicted"),
    row("xkv/pyramid", XKV(fraction=0.3, rule="pyramid", scorer="expected"), means="evicted"),
    row("xkv/uniform", XKV(fraction=0.3, rule="uniform", scorer="value"), means="evicted"),
    row("xkv/paper", XKV(fraction=0.3, paper=True), kernel="native", means="evicted native"),
    row("xkv+infinigen", XKV(fraction=0.6), OURS, means="sparse index evicted"),
    row("xkv+oracle/padded", XKV(fraction=0.6), ORACLE, **PADDED, means="sparse evicted"),
)

TIERS = (
    row("near/blocks", LEAN, **TIGHT, means="sparse index far blocks"),
    row("near", OURS, **NEAR, means="sparse index far"),
    row("near/hot", OURS, **ROOMY, means="sparse index hot"),
    row("near/hot/grows", OURS, **ROOMY, tokens=0, means="sparse index far"),
    row("near/hot/plain", OPEN, **ROOMY, kernel="plain", means="sparse index hot plain"),
    row("near/blocks/plain", LEAN, **TIGHT, kernel="plain", means="sparse index far blocks plain"),
    row("near/no-top-up", OPEN, **NEAR, means="sparse index far"),
    row("near/chunks", OURS, **NEAR, chunk=64, means="sparse index far"),
    row("near/residual", InfiniGen(fraction=0.2, source="residual"), **NEAR, means="sparse index far"),
    row("near/attn", InfiniGen(fraction=0.2, source="attn"), **NEAR, means="sparse index far"),
    row("near/top-p", InfiniGen(fraction=0.2, top_p=0.5), **NEAR, means="sparse index far"),
    row("near/paper", PAPER, model="opt", near="500KiB", means="sparse index far"),
    row("near/full", Full(), **TIGHT, means="far blocks"),
    row("near/oracle", ORACLE, **NEAR, means="sparse far"),
    row("near/random", Random(fraction=0.2), **NEAR, means="sparse far"),
    row("near/pages", PAGES, **NEAR, means="sparse index far"),
    row("near/lowbit", LOWBIT, **ROOMY, means="sparse index hot"),
    row("near/snapkv", SnapKV(fraction=0.2), near="450KiB", means="sparse evicted"),
    row("near/xkv", XKV(fraction=0.3), near="450KiB", means="evicted"),
    row("near/xkv+infinigen", XKV(fraction=0.6), OURS, **ROOMY, means="sparse index evicted far"),
    row("host", OURS, host="360KiB", means="sparse index"),
    row("host/near", OURS, host="400KiB", **NEAR, means="sparse index far"),
    *(row(f"disk/{name}", OURS, **DISK, evict=name, means="sparse index disk") for name in ("refuse", *POLICIES)),
    row("disk/roomy", OURS, disk="4MiB", means="sparse index"),
    row("disk/near", OURS, **DISK, **NEAR, means="sparse index far disk"),
    row("disk/near/hot", OURS, **DISK, **ROOMY, evict="lru", means="sparse index hot disk"),
    row("disk/paper", PAPER, model="opt", disk="4MiB", host="700KiB", chunk=64, means="sparse index disk"),
    row("disk/full", Full(), **DISK, means="disk"),
    row("disk/oracle", ORACLE, **DISK, evict="lru", means="sparse disk"),
    row("disk/window", Window(fraction=0.2), **DISK, means="sparse disk"),
    row("disk/random", Random(fraction=0.2), **DISK, evict="clock", means="sparse disk"),
    row("disk/pages", PAGES, **DISK, means="sparse index disk"),
    row("disk/lowbit", LOWBIT, **DISK, evict="score", means="sparse index disk"),
    row("disk/fills", OURS, text=330, disk="4MiB", host="260KiB", chunk=64, means="sparse index disk"),
    row("disk/fills/near", OURS, text=330, **DISK, **NEAR, evict="lru", means="sparse index far disk"),
    row("disk/fills/oracle", ORACLE, text=330, **DISK, means="sparse disk"),
    row("disk/fills/lowbit", LOWBIT, text=330, **DISK, evict="clock", means="sparse index disk"),
    row("disk/fills/roomy", OURS, text=330, disk="4MiB", means="sparse index"),
    *(row(f"spill/{name}", OURS, **SPILL, evict=name, means="sparse index evicted") for name in POLICIES),
    row("spill/near", OURS, **SPILL, **NEAR, evict="lru", means="sparse index evicted far"),
    row("spill/grows", OURS, **SPILL, tokens=0, evict="counter", means="sparse index evicted"),
    row("spill/padded", OURS, host="560KiB", chunk=64, evict="clock", **PADDED, means="sparse index evicted"),
    row("spill/paper", PAPER, host="200KiB", chunk=64, evict="fifo", means="sparse index evicted"),
    row("spill/full", Full(), **SPILL, evict="score", means="evicted"),
    row("spill/oracle", ORACLE, **SPILL, evict="clock", means="sparse evicted"),
    row("spill/window", Window(fraction=0.2), **SPILL, evict="lru", means="sparse evicted"),
    row("spill/random", Random(fraction=0.2), **SPILL, evict="counter", means="sparse evicted"),
    row("spill/pages", PAGES, **SPILL, evict="score", means="sparse index evicted"),
    row("spill/lowbit", LOWBIT, **SPILL, evict="counter", means="sparse index evicted"),
)

STORED = (
    row("int8", OURS, quant="int8", means="sparse index quant"),
    row("int4", OURS, quant="int4", means="sparse index quant"),
    row("int4/plain", OURS, quant="int4", kernel="plain", means="sparse index quant plain"),
    row("int8/full", Full(), quant="int8", means="quant"),
    row("int4/lowbit", LOWBIT, quant="int4", means="sparse index quant"),
    row("int8/pages/padded", PAGES, quant="int8", **PADDED, means="sparse index quant"),
    row("int8/near", OURS, quant="int8", near="90KiB", chunk=64, means="sparse index quant far"),
    row("int4/near/hot", OURS, quant="int4", **NEAR, means="sparse index quant hot"),
    row("int8/disk", OURS, quant="int8", disk="4MiB", host="150KiB", chunk=64, evict="lru", means="sparse quant disk"),
    row("int4/disk/near", OURS, quant="int4", disk="4MiB", host="100KiB", chunk=64, **NEAR, means="quant disk far"),
    row("int8/spill", OURS, quant="int8", host="180KiB", chunk=64, evict="score", means="sparse quant evicted"),
)

BATCHES = (
    row("batch", OURS, batch=3, means="sparse index native"),
    row("padded", OURS, **PADDED, means="sparse index native"),
    row("padded/plain", OURS, **PADDED, kernel="plain", means="sparse index plain"),
    row("padded/young", OURS, batch=3, text=150, pad=140, means="sparse index fallback"),
    row("padded/young/near", OURS, batch=3, text=150, pad=140, near="400KiB", means="sparse index far"),
    row("padded/near", OURS, **PADDED, near="600KiB", means="sparse index far"),
    row("padded/near/hot", OPEN, **PADDED, near="900KiB", means="sparse index far"),
    row("padded/disk", OURS, **PADDED, disk="4MiB", host="700KiB", chunk=64, evict="lru", means="sparse disk"),
    row("padded/chunks", OURS, **PADDED, chunk=64, means="sparse index"),
    row("padded/paper", PAPER, **PADDED, model="opt", means="sparse index"),
    row("padded/oracle", ORACLE, **PADDED, means="sparse"),
    row("padded/window", Window(fraction=0.2), **PADDED, means="sparse"),
    row("padded/random", Random(fraction=0.2), **PADDED, means="sparse"),
    row("padded/pages", PAGES, **PADDED, means="sparse index"),
    row("padded/lowbit", LOWBIT, **PADDED, near="900KiB", means="sparse index far"),
    row("padded/full", Full(), **PADDED, near="400KiB", means="far"),
    row("padded/snapkv", SnapKV(fraction=0.3), **PADDED, means="evicted"),
    row("padded/h2o", H2O(fraction=0.3), **PADDED, means="evicted"),
    row("padded/xkv", XKV(fraction=0.3), **PADDED, means="evicted"),
    row("join", OURS, way="join", tokens=0, means="sparse index"),
    row("join/near", OURS, way="join", tokens=0, near="900KiB", means="sparse index far"),
    row("join/lowbit", LOWBIT, way="join", tokens=0, means="sparse index"),
    row("beams", OURS, num_beams=3, means="sparse index"),
    row("beams/near", OURS, num_beams=3, near="900KiB", means="sparse index far"),
    row("beams/disk", OURS, num_beams=3, disk="4MiB", host="700KiB", chunk=64, means="sparse index disk"),
    row("beams/xkv", XKV(fraction=0.3), num_beams=3, means="evicted"),
    row("beams/spill", OURS, num_beams=3, host="560KiB", chunk=64, evict="clock", means="evicted"),
)

WAYS = (
    row("lookup", OURS, prompt_lookup_num_tokens=3, means="index"),
    row("lookup/near", OURS, prompt_lookup_num_tokens=3, **ROOMY, means="index far"),
    row("crop", OURS, way="crop", means="sparse index"),
    row("crop/near", OURS, way="crop", near="480KiB", means="sparse index hot"),
    row("crop/disk", OURS, way="crop", disk="4MiB", host="560KiB", means="sparse index disk"),
    row("crop/pages", PAGES, way="crop", means="sparse index"),
    row("fork", OURS, way="fork", means="sparse index"),
    row("fork/near", OURS, way="fork", **ROOMY, means="sparse index hot"),
    row("fork/disk", OURS, way="fork", disk="4MiB", host="560KiB", means="sparse index disk"),
    row("fork/h2o", H2O(fraction=0.3), way="fork", means="evicted"),
    row("reset/near", OURS, way="reset", **ROOMY, means="sparse index"),
    row("reset/xkv", XKV(fraction=0.3), way="reset", means="evicted"),
    row("reset/disk", OURS, way="reset", disk="4MiB", host="560KiB", means="sparse index"),
    row("session", OURS, way="resume", means="sparse index lazy"),
    row("session/tight", OURS, way="resume", host="215KiB", evict="lru", means="sparse index lazy"),
    row("session/near", OURS, way="resume", **NEAR, means="sparse index far lazy"),
    row("session/disk", OURS, way="resume", disk="4MiB", host="220KiB", means="sparse index"),
    row("session/int8", OURS, way="resume", quant="int8", means="sparse index quant lazy"),
    row("session/paper", PAPER, way="resume", profile=True, means="sparse index lazy"),
    row("session/full", Full(), way="resume", means="lazy"),
    row("session/oracle", ORACLE, way="resume", means="sparse lazy"),
    row("session/pages", PAGES, way="resume", means="sparse index lazy"),
    row("session/lowbit", LOWBIT, way="resume", verify=3, means="sparse index lazy verified"),
    row("session/window", Window(fraction=0.2), way="resume", means="sparse lazy"),
    row("session/gemma2", OURS, way="resume", model="gemma2", means="sparse index unmanaged lazy"),
    row("session/lengthen", OURS, way="lengthen", tokens=440, means="sparse index lazy"),
    row("session/save-near", OURS, way="save", **ROOMY, means="sparse index far lazy"),
    row("session/save-disk", OURS, way="save", disk="4MiB", means="sparse index"),
    row("verify", OURS, verify=4, means="sparse verified"),
    row("verify/near", OURS, verify=4, **ROOMY, means="sparse far verified"),
    row("verify/disk", OURS, verify=4, disk="4MiB", host="270KiB", chunk=64, means="sparse disk verified"),
    row("verify/padded", ORACLE, verify=4, **PADDED, means="sparse verified"),
    row("verify/xkv", XKV(fraction=0.3), verify=4, means="evicted verified"),
    row("verify/gemma2", OURS, verify=4, model="gemma2", means="sparse unmanaged verified"),
)

PLANS = (
    row("plan/keep", XKV(), plan={"keep": KEEP}, means="evicted"),
    row("plan/keep/near", XKV(), plan={"keep": KEEP}, near="300KiB", means="evicted"),
    row("plan/keep/chunks", XKV(), plan={"keep": KEEP}, chunk=64, means="evicted"),
    row("plan/fetch", plan={"fetch": FETCH}, means="sparse index"),
    row("plan/fetch/near", plan={"fetch": FETCH}, **ROOMY, means="sparse index far"),
    row("plan/fetch/disk", plan={"fetch": FETCH}, **DISK, means="sparse index disk"),
    row("plan/fetch/oracle", Oracle(fraction=0.5), plan={"fetch": FETCH}, **PADDED, means="sparse"),
    row("plan/near", OPEN, HOLD, plan=ALL, **ROOMY, means="hot"),
    row("plan/near/beams", OPEN, HOLD, plan=ALL, near="500KiB", num_beams=2, means="sparse far"),
    row("plan/near/crop", OPEN, HOLD, plan=ALL, **ROOMY, way="crop", means="sparse far"),
    row("plan/all", InfiniGen(), THREE, plan=ALL, means="sparse evicted"),
    row("plan/all/near", InfiniGen(), THREE, plan=ALL, near="400KiB", means="sparse evicted far"),
)

MODELS = (
    row("gemma2", OURS, model="gemma2", means="sparse index unmanaged"),
    row("gemma2/near/padded", OURS, model="gemma2", near="700KiB", **PADDED, means="sparse index far unmanaged"),
    row("gpt_oss", OURS, model="gpt_oss", means="sparse index unmanaged"),
    row("gpt_oss/near", LEAN, model="gpt_oss", near="125KiB", text=600, chunk=64, means="sparse index far unmanaged"),
    row("gpt_oss/full", Full(), model="gpt_oss", kernel="native", means="native unmanaged"),
    row("lfm2", OURS, model="lfm2", means="sparse index unmanaged"),
    row("opt/near", OURS, model="opt", near="500KiB", means="sparse index far"),
    row("bfloat16", OURS, model="llama-bfloat16", means="sparse index native"),
    row("bfloat16/near", OURS, model="llama-bfloat16", **NEAR, means="sparse index far"),
    row("bfloat16/disk/int4", OURS, model="llama-bfloat16", quant="int4", disk="4MiB", means="sparse quant"),
    row("demo", model="demo", text=1400, means="sparse index native"),
    row("demo/near", model="demo", text=1400, near="2MiB", chunk=256, means="sparse index far"),
    row("demo/disk", OURS, model="demo", text=700, disk="32MiB", host="1536KiB", chunk=128, means="sparse disk"),
    row("demo/xkv", XKV(fraction=0.3), model="demo", text=700, means="evicted"),
    row("demo/pages/verify", PAGES, model="demo", text=700, verify=4, means="sparse verified"),
)

COMMANDS = tuple(
    row(f"run/{name}", *arguments.split(), way="command", model="demo", text=2000, means=means, **options)
    for name, arguments, means, options in (
        ("default", "", "native", {}),
        ("near", "--fraction=0.2 --chunk-tokens=128", "sparse index far", {"near": "1500KiB"}),
        ("chunks", "--fraction=0.2 --chunk-tokens=128 --verify=3", "sparse index verified", {}),
        ("snapkv", "--method=snapkv --fraction=0.3 --chunk-tokens=128", "evicted", {}),
        ("h2o", "--method=h2o --fraction=0.3 --chunk-tokens=128", "evicted", {}),
        ("xkv", "--method=xkv --retention=0.8 --chunk-tokens=200 --query-aware", "evicted", {}),
        ("plan", "--method=xkv", "evicted", {"plan": {"keep": KEEP + KEEP}}),
        ("spill", "--fraction=0.2", "sparse index evicted", {"host": "2MiB", "evict": "counter"}),
        ("disk", "--fraction=0.2 --disk=FOLDER/pages:32MiB", "sparse index disk", {"host": "2MiB"}),
        ("session", "--fraction=0.2 --session=FOLDER/text.farkv", "sparse index lazy", {"quant": "int8"}),
    )
)

REFUSED = tuple(
    row(f"refused/{name}", *methods, means="refused", **options)
    for name, methods, options in (
        ("near", (OURS,), {"near": "8KiB"}),
        ("near/full", (Full(),), {"near": "8KiB"}),
        ("near/later", (OURS,), {"near": "70KiB", "tokens": 0}),
        ("near/xkv", (XKV(fraction=0.3),), {"near": "100KiB"}),
        ("host", (OURS,), {"host": "200KiB"}),
        ("host/later", (OURS,), {"host": "335KiB", "tokens": 0}),
        ("host/spill", (OURS,), {"host": "60KiB", "evict": "lru"}),
        ("host/chunk", (OURS,), {"host": "200KiB", "evict": "lru", "tokens": 0}),
        ("disk", (OURS,), {"disk": "100KiB"}),
        ("disk/host", (OURS,), {"disk": "4MiB", "host": "60KiB"}),
        ("disk/later", (OURS,), {"disk": "200KiB", "tokens": 0}),
        ("evict/no-limit", (OURS,), {"evict": "lru"}),
        ("evict/xkv", (XKV(),), {"evict": "lru", "host": "1MiB"}),
        ("quant/snapkv", (SnapKV(),), {"quant": "int8"}),
        ("disk/xkv", (XKV(),), {"disk": "1MiB"}),
        ("two-methods", (OURS, ORACLE), {}),
        ("full+xkv", (Full(), XKV()), {}),
        ("h2o+plan", (H2O(),), {"plan": {"fetch": FETCH}}),
        ("lever-alone", (XKV(levers=("near",)),), {}),
        ("plan/other-lever", (XKV(),), {"plan": {"fetch": FETCH}}),
        ("plan/cap", (InfiniGen(fraction=0.1),), {"plan": {"fetch": FETCH}}),
        ("paper/fraction", (InfiniGen(paper=True),), {}),
        ("session/snapkv", (SnapKV(),), {"way": "resume"}),
        ("session/spill", (OURS,), {"way": "save", **SPILL, "evict": "lru"}),
        ("crop/xkv", (XKV(fraction=0.3),), {"way": "crop"}),
        ("join/xkv", (XKV(fraction=0.3),), {"way": "join", "tokens": 0}),
    )
)

ROWS = (*IN_PLACE, *TIERS, *STORED, *BATCHES, *WAYS, *PLANS, *MODELS, *COMMANDS, *REFUSED)
