"""`make bench`: measure, print one table, write results.json, README.md's table and growth.png.

Ours and the peer's runs alternate in one process, and medians are compared. ``--quick`` measures
everything once, with less work, to see that it runs. ``--only`` measures some lines again and
leaves the others as they are.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from tqdm import tqdm

import steerlib as sl
from steerlib.engine import decode

from .peers import Peer, Repeng, SteeringVectors

HERE = Path(__file__).parent
MODEL = "smollm2-135m"
LARGE = "qwen2.5-coder-1.5b"
# Shapes for --random: weights drawn at random take as long as trained ones.
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2-xl": {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25},
    "llama-2-13b": {
        "model_type": "llama", "hidden_size": 5120, "num_hidden_layers": 40,
        "num_attention_heads": 40, "intermediate_size": 13824,
    },
    "tiny": {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4},
}  # fmt: skip
RANDOM = "sweep steered bridge waits own scoring limits".split()  # lines that any model can have
TARGETS = [" a wedding", " the bride and groom", " their marriage", " the church bells"]
REFERENCES = [" a meeting", " the rain and wind", " their holiday", " the train station"]
QUIET: dict[str, Any] = {"progress": False}
BEGIN, END = "<!-- table: written by make bench -->", "<!-- end of table -->"


@dataclass
class Line:
    """One line of the table: times in seconds, or another unit where it says so."""

    line: str
    what: str
    ours: float
    peer: float | None = None
    target: str = ""
    met: bool | None = None
    unit: str = "s"
    note: str = ""
    part: str = ""  # of the names that --only takes

    @property
    def ratio(self) -> float | None:
        return self.peer / self.ours if self.peer is not None and self.ours else None


def compare(rounds: int, *runs: Callable[[], Any]) -> list[float]:
    """Median seconds of each of ``runs``, taken in turns."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for taken, run in zip(times, runs, strict=True):
            begin = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - begin)
    return [statistics.median(taken) for taken in times]


class Peak:
    """``with Peak() as peak``: by how many MB the process grew inside the block."""

    def __enter__(self) -> Peak:
        self.process, self.done = psutil.Process(), threading.Event()
        self.before = self.most = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.01):
            self.most = max(self.most, self.process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.megabytes = (self.most - self.before) / 1e6


@contextmanager
def endless() -> Iterator[None]:
    """No token ends a text, so that every run decodes the same number of tokens."""
    with mock.patch.object(decode, "end_tokens", lambda model: set()):
        yield


class Bench:
    """The lines. Each method gives some of them."""

    def __init__(self, quick: bool, device: str = "cpu", random: str | None = None):
        self.quick = quick
        self.rounds = 1 if quick else 5
        folder = sl.load_model(MODEL, dtype="float32", device="cpu").tokenizer.name_or_path
        self.device = device
        self.folder, self.name = folder, f"random {random}" if random else MODEL
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        plain = None
        if random:
            self.model, plain = random_model(SHAPES[random], folder, device, self.dtype)
        else:
            self.model = sl.load_model(MODEL, dtype=self.dtype, device=device)
            if device != "cpu":
                plain = Peer(folder, dtype=self.dtype).model.to(device)
        self.theirs: dict[str, Any] = {
            "steering-vectors": SteeringVectors(folder, plain),
            "repeng": Repeng(folder, plain),
        }
        self.plain: Peer = self.theirs["steering-vectors"]
        prompts = sl.datasets.load("prompts").query("set == 'fractions'").prompt
        self.prompts = list(prompts[:6])
        claims = sl.datasets.load("claims").claim[: 20 if quick else 200]
        self.questions = [f"{c}\n(A) True (B) False Answer: (" for c in claims]
        self.pairs = [(q + "A", q + "B") for q in self.questions]
        self.vector = 4 * sl.SteeringVector.from_prompts(self.model, " wedding", " ", layer=3)
        self.direction = sl.SteeringVector(
            {3: self.vector.layers[3][-1:]}, site="resid_pre", at="generated"
        )

    def ours(self, conditions: Any, n_samples: int, n_tokens: int, prompts: Any = None) -> Any:
        prompts = self.prompts if prompts is None else prompts
        return sl.generate(self.model, prompts, conditions, n_samples, n_tokens, progress=False)

    def sweep(self) -> Iterator[Line]:
        """1, 2 and part of 8: a whole sweep against loops over its conditions."""
        n_tokens, part = (8, 1) if self.quick else (40, 2)
        fractions = [i / 10 for i in range(11)]
        named = {str(f): self.vector.truncate(f) if f else None for f in fractions}
        flat = [(3, self.direction.truncate(f).layers[3][0]) for f in fractions]

        def loop(name: str) -> Callable[[], None]:
            turns = iter(range(0, 1000, part))

            def run() -> None:
                # A few conditions in every round, others each time: all cost the same.
                first = next(turns)
                chosen = [flat[(first + i) % len(flat)] for i in range(part)]
                self.theirs[name].sweep(chosen, self.prompts, 10, n_tokens)

            return run

        ours = partial(self.ours, named, 10, n_tokens)
        times = compare(self.rounds, ours, *map(loop, self.theirs))
        scale = len(flat) / part
        for i, name in enumerate(self.theirs, start=1):
            yield Line(
                str(i),
                f"sweep of {len(named)} conditions x 6 prompts x 10 samples x {n_tokens} "
                f"tokens vs a loop with {name}",
                times[0],
                times[i] * scale,
                ">= 4x",
                note=f"peer: {part} of {len(flat)} conditions a round, times {scale:g}",
            )

    def steered(self) -> Iterator[Line]:
        """3: what steering costs."""
        n = 4 if self.quick else 20
        with endless():
            free, steered = compare(
                self.rounds,
                lambda: self.ours({"x": None}, 100, n, self.prompts[0]),
                lambda: self.ours({"x": self.direction}, 100, n, self.prompts[0]),
            )
        yield Line(
            "3", f"steered at every token vs unsteered (as peer), batch 100, {n} tokens", steered,
            free, "<= 1.05x the time", steered <= 1.05 * free,
        )  # fmt: skip

    def bridge(self) -> Iterator[Line]:
        """4: our loop against TransformerLens' own."""
        for batch, n in ((1, 8), (100, 4)) if self.quick else ((1, 40), (100, 20)):

            def theirs(batch: int = batch, n: int = n) -> None:
                self.model.generate(
                    [self.prompts[0]] * batch,
                    max_new_tokens=n,
                    stop_at_eos=False,
                    top_p=0.3,
                    freq_penalty=1.0,
                    verbose=False,
                    return_type="tokens",
                )

            def ours(batch: int = batch, n: int = n) -> None:
                self.ours({"x": None}, batch, n, self.prompts[0])

            with endless():
                mine, peer = compare(self.rounds, ours, theirs)
            yield Line(
                "4",
                f"unsteered vs TransformerBridge.generate, batch {batch}, {n} tokens",
                mine,
                peer,
                "not slower",
                mine <= peer,
            )

    def contrast(self) -> Iterator[Line]:
        """5 and part of 8: activations of contrast pairs."""

        def ours() -> None:
            sl.capture_pairs(self.model, self.questions, ["A", "B"])

        best = {}
        few = self.pairs[:40]
        for name, peer in self.theirs.items():
            sizes = {n: compare(1, lambda p=peer, n=n: p.read(few, n))[0] for n in (4, 16, 40)}
            best[name] = min(sizes, key=sizes.__getitem__)

        peers = [partial(p.read, self.pairs, best[name]) for name, p in self.theirs.items()]
        times = compare(self.rounds, ours, *peers)
        for i, name in enumerate(self.theirs, start=1):
            yield Line(
                "5",
                f"{len(self.pairs)} two-choice pairs, all layers, one position vs " + name,
                times[0],
                times[i],
                ">= 2.5x",
                note=f"peer: best batch size {best[name]}",
            )

    def answers(self) -> Iterator[Line]:
        """6: answer probabilities against generated answers."""
        n, n_tokens = (4, 4) if self.quick else (40, 30)
        named = {str(c): sl.Add(self.direction, "generated", c / 10) for c in range(1, n + 1)}
        mine, peer = compare(
            1,
            lambda: sl.choice_probabilities(self.model, self.questions, ["A", "B"], named),
            lambda: self.theirs["steering-vectors"].sweep(
                [(3, self.direction.layers[3][0])], self.questions, 1, n_tokens
            ),
        )
        yield Line(
            "6",
            f"answers to {len(self.questions)} prompts x {n} conditions vs generating "
            f"{n_tokens} tokens each with steering-vectors",
            mine,
            n * peer,
            "report",
            note=f"one run; peer: one condition, times {n}",
        )

    def cold_start(self) -> Iterator[Line]:
        """7: a new process until the model is ready."""
        mine = f"import steerlib as sl; sl.load_model({MODEL!r}, dtype='float32', device='cpu')"
        peer = (
            "import torch; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
            f"f = {self.folder!r}; M.from_pretrained(f, dtype=torch.float32); T.from_pretrained(f)"
        )

        def start(code: str) -> Callable[[], Any]:
            return lambda: subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, cwd=HERE.parent
            )

        ours, theirs = compare(self.rounds, start(mine), start(peer))
        yield Line(
            "7",
            "cold start: import and load from a warm cache vs transformers alone",
            ours,
            theirs,
            "<= 1.2x the time",
            ours <= 1.2 * theirs,
        )
        (alone,) = compare(self.rounds, start("import steerlib"))
        (bare,) = compare(self.rounds, start("pass"))
        yield Line(
            "7", "import steerlib, an empty Python (as peer) taken off", alone - bare, bare,
            "< 0.2 s", alone - bare < 0.2,
        )  # fmt: skip

    def panel(self) -> Iterator[Line]:
        """10: how soon a panel shows its first new token."""
        panel = sl.panels.SteeringPanel(
            self.model, self.prompts[0], " wedding", " ", layer=3, max_new_tokens=4
        )
        shown: list[float] = []
        panel.output.observe(lambda _: shown.append(time.perf_counter()), "value")
        waits = []
        for coefficient in range(1, 2 * self.rounds + 1):  # within the slider, none twice in a row
            shown.clear()
            begin = time.perf_counter()
            panel.coefficient.value = coefficient
            waits.append(shown[0] - begin)
        wait = statistics.median(waits)
        yield Line(
            "10",
            "letting go of the slider until the panel shows the first new token",
            wait,
            target="< 0.3 s",
            met=wait < 0.3,
        )

    def waits(self) -> Iterator[Line]:
        """11: what a person waits for: few rows, steered at every position, greedily."""
        yield from self._waits(self.model, self.plain, self.direction)

    def _waits(self, model: Any, plain: Peer, direction: Any, name: str = "") -> Iterator[Line]:
        prompt, everywhere = self.prompts[0], sl.Add(direction, "all")
        (layer,) = direction.layers
        vector = direction.layers[layer][0].to(self.model.cfg.device, model.cfg.dtype)
        n = 4 if self.quick else 40
        for batch in (1, 32) if name else (1, 8):

            def ours(batch: int = batch) -> None:
                sl.generate(model, prompt, {"x": everywhere}, batch, n, temperature=0, **QUIET)

            def theirs(batch: int = batch) -> None:
                plain.greedy([prompt] * batch, n)

            def hooked(batch: int = batch) -> None:
                hook = (f"blocks.{layer}.hook_resid_pre", lambda x, hook: x + vector)
                with model.hooks(fwd_hooks=[hook]):
                    model.generate(
                        [prompt] * batch, max_new_tokens=n, stop_at_eos=False, do_sample=False,
                        verbose=False, return_type="tokens",
                    )  # fmt: skip

            runs = [ours, theirs] if name else [ours, theirs, hooked]
            with endless():
                times = compare(self.rounds, *runs)
            what = f"{name}steered at every position, greedy, batch {batch}, {n} tokens vs "
            peers = [
                ("transformers' own generate, unsteered", ">= 0.95x" if name else ">= 1x"),
                ("TransformerBridge.generate with a hook", ">= 1.35x"),
            ]
            for (peer, target), taken in zip(peers, times[1:], strict=False):
                yield Line("14" if name else "11", what + peer, times[0], taken, target)

    def own(self) -> Iterator[Line]:
        """12: larger batches against transformers' own generate with the same sampler."""
        n = 4 if self.quick else 20
        for batch in (32, 100):
            with (
                endless(),
                mock.patch.object(self.plain.model.generation_config, "eos_token_id", None),
            ):
                mine, peer = compare(
                    self.rounds,
                    partial(self.ours, {"x": self.direction}, batch, n, self.prompts[0]),
                    partial(self.plain.sample, [self.prompts[0]], batch, n),
                )
            yield Line(
                "12",
                f"steered vs transformers' own generate, unsteered, same sampler, batch {batch}, "
                f"{n} tokens",
                mine,
                peer,
                ">= 1.1x",
            )

    def scoring(self) -> Iterator[Line]:
        """13: propensity under many conditions against a loop of plain forward passes."""
        n_prompts, n_conditions = (3, 8) if self.quick else (30, 40)
        prompts = list(sl.datasets.load("prompts").query("set == 'neutral'").prompt[:n_prompts])
        depth = self.model.cfg.n_layers
        layers = [depth * i // 5 for i in (1, 2, 3, 4)]
        vector = self.direction.layers[3][0]
        encode, more = self.plain.tokenizer, TARGETS + REFERENCES
        pairs = [(sl.encode(self.model, p), encode(m, add_special_tokens=False)["input_ids"])
                 for p in prompts for m in more]  # fmt: skip
        flat = [(layers[i % 4], (1 + i // 4) * vector) for i in range(n_conditions)]
        _, blocks = max(
            ((m, m) for m in self.plain.model.modules() if isinstance(m, torch.nn.ModuleList)),
            key=lambda pair: len(pair[0]),
        )
        for late, target in ((True, ">= 4x"), (False, ">= 2x")):
            at = "generated" if late else "front"
            conditions = {
                str(i): sl.Add(sl.SteeringVector({layer: v[None]}, site="resid_pre"), at)
                for i, (layer, v) in enumerate(flat)
            }
            args = (blocks, flat[:1], pairs, late)
            sizes = {
                n: compare(1, partial(self.plain.score, *args, n))[0]
                for n in ((16,) if self.quick else (16, 48))
            }
            best = min(sizes, key=sizes.__getitem__)
            part = 1 if self.quick else 2
            mine, peer = compare(
                1 if self.quick else 3,
                lambda c=conditions: sl.propensity(self.model, prompts, TARGETS, REFERENCES, c),
                partial(self.plain.score, blocks, flat[:part], pairs, late, best),
            )
            where = "from the last prompt token on" if late else "at the front"
            yield Line(
                "13",
                f"propensity, {n_prompts} prompts x {len(more)} continuations x {n_conditions} "
                f"conditions at 4 layers, acting {where}, vs plain forward passes with a hook",
                mine,
                peer * n_conditions / part,
                target,
                note=f"peer: best batch size {best}; {part} of {n_conditions} conditions a round",
            )

    def large(self) -> Iterator[Line]:
        """14 and part of 9: the large packaged model, in the dtype that is the faster one here."""
        model = sl.load_model(LARGE, dtype="auto", device="cpu")
        kind = model.cfg.dtype
        plain = Peer(model.tokenizer.name_or_path, dtype=kind)
        shape = (1, model.cfg.d_model)
        v = sl.SteeringVector({17: torch.randn(shape)}, site="resid_pre", at="generated")
        name = f"{LARGE}, {str(kind).removeprefix('torch.')}: "
        rounds, self.rounds = self.rounds, min(self.rounds, 3)
        try:
            yield from self._waits(model, plain, v, name)
            sizes = ((100, 2),) if self.quick else ((100, 20),)
            yield from self._limits(model, plain, sizes, name)
        finally:
            self.rounds = rounds

    def peak(self, what: str, who: str) -> float:
        """Megabytes by which this process grows, once, for line 8."""
        fractions = {str(i): self.vector.truncate(i / 10) if i else None for i in range(11)}
        peer = self.theirs.get(who)
        with Peak() as peak:
            if what == "sweep" and peer is None:
                self.ours(fractions, 10, 4 if self.quick else 40)
            elif what == "sweep" and peer is not None:
                one = [(3, self.direction.layers[3][0])]
                peer.sweep(one, self.prompts, 10, 4 if self.quick else 40)
            elif peer is None:
                sl.capture_pairs(self.model, self.questions, ["A", "B"])
            else:
                peer.read(self.pairs, 16)
        return peak.megabytes

    def peaks(self) -> Iterator[Line]:
        """8: memory on top of the loaded models, each time in a fresh process."""

        def measure(what: str, who: str) -> float:
            more = ["--quick"] if self.quick else []
            command = [sys.executable, "-m", "benchmarks", *more, "--peak", what, who]
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, cwd=HERE.parent
            )
            return float(done.stdout.split()[-1])

        for what, line in (("sweep", "1"), ("pairs", "5")):
            mine = measure(what, "steerlib")
            for name in self.theirs:
                peer = measure(what, name)
                note = "peer: 60 rows at once" if what == "sweep" else "peer: batch 16"
                target, met = (
                    ("<= 1.5x", mine <= 1.5 * peer) if what == "sweep" else ("report", None)
                )
                yield Line(
                    "8", f"peak memory of {line} vs {name}", mine, peer, target, met,
                    unit="MB", note=note,
                )  # fmt: skip

    def limits(self) -> Iterator[Line]:
        """9: tokens/s against what the machine allows. Here "ours" is what was reached."""
        sizes = ((1, 8), (100, 4)) if self.quick else ((1, 40), (100, 20), (660, 20))
        yield from self._limits(self.model, self.plain, sizes)

    def _limits(self, model: Any, plain: Peer, sizes: Any, name: str = "") -> Iterator[Line]:
        kinds = ("Linear", "Conv1D")
        layers = [m for m in plain.model.modules() if type(m).__name__ in kinds]
        widths = [m.weight.shape[type(m).__name__ == "Linear"] for m in layers]
        weights = layers[0].weight
        size = sum(m.weight.numel() * m.weight.element_size() for m in layers)
        big = torch.ones(size // 4, device=weights.device)
        for batch, n in sizes:
            inputs = {k: torch.randn(batch, k).to(weights) for k in set(widths)}

            def products(batch: int = batch, inputs: Any = inputs) -> None:
                if batch == 1:  # as fast as the weights can be read
                    big.sum()
                    return
                for layer, width in zip(layers, widths, strict=True):
                    layer(inputs[width])

            def ours(batch: int = batch, n: int = n) -> None:
                sl.generate(model, self.prompts[0], {"x": None}, batch, n, **QUIET)

            with endless(), torch.no_grad():
                mine, bare = compare(2, ours, products)
            speed, limit = batch * n / mine, batch / bare
            why = "reading all weights" if batch == 1 else "bare products of the model's shapes"
            yield Line(
                "9", f"{name}tokens/s at batch {batch} vs {why}, at the same moment", speed, limit,
                "report" if batch == 1 else ">= 75 %",
                None if batch == 1 else speed >= 0.75 * limit, unit="tok/s",
                note=f"reached {speed / limit:.0%}",
            )  # fmt: skip

    def growth(self, path: Path) -> dict[str, Any]:
        """How time grows with conditions, samples and prompt length."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        n, peer, layer = (2 if self.quick else 10), self.theirs["steering-vectors"], 3
        vector, words = self.direction.layers[layer][0], "the old bridge over the river " * 100
        tokens = sl.encode(self.model, words)
        lengths = {k: self.model.tokenizer.decode(tokens[: k - 1]) for k in (8, 32, 128, 256)}
        one = {"x": self.direction}

        def many(k: int) -> dict[str, Any]:
            return {str(c): sl.Add(self.direction, coefficient=c / k) for c in range(1, k + 1)}

        prompt = self.prompts[0]
        panels: dict[str, tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]] = {
            "conditions (10 samples each)": (
                (1, 2, 4, 8, 16),
                lambda k: self.ours(many(k), 10, n, prompt),
                lambda k: peer.sweep([(layer, vector)] * k, [prompt], 10, n),
            ),
            "samples (one condition)": (
                (1, 8, 32, 128),
                lambda k: self.ours(one, k, n, prompt),
                lambda k: peer.sweep([(layer, vector)], [prompt], k, n),
            ),
            "prompt length in tokens (10 samples)": (
                tuple(lengths),
                lambda k: self.ours(one, 10, n, lengths[k]),
                lambda k: peer.sweep([(layer, vector)], [lengths[k]], 10, n),
            ),
        }
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), constrained_layout=True)
        found: dict[str, Any] = {}
        with endless():
            for ax, (name, (sizes, ours, theirs)) in zip(axes, panels.items(), strict=True):
                times = [
                    compare(min(self.rounds, 2), partial(ours, k), partial(theirs, k))
                    for k in sizes
                ]
                mine, peers = zip(*times, strict=True)
                ax.plot(sizes, mine, "o-", label="steerlib")
                ax.plot(sizes, peers, "s--", label="loop with steering-vectors")
                ax.set(xlabel=name, ylabel=f"seconds for {n} tokens", xscale="log", ylim=(0, None))
                ax.set_xticks(sizes, [str(k) for k in sizes], minor=False)
                ax.minorticks_off()
                found[name] = {"sizes": sizes, "steerlib": mine, "steering-vectors": peers}
        axes[0].legend(frameon=False)
        figure.savefig(path, dpi=120, metadata={"Software": None})
        return found


def machine() -> str:
    """The machine in words, without names that identify it."""
    memory = psutil.virtual_memory().total / 1e9
    kind = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        rows = [row for row in cpuinfo.read_text().splitlines() if row.startswith("model name")]
        kind = rows[0].split(":")[1].strip() if rows else kind
    return (
        f"{kind}, {torch.get_num_threads()} threads, {memory:.0f} GB memory; Python "
        f"{platform.python_version()}, torch {torch.__version__.split('+')[0]}"
    )


def table(lines: list[Line]) -> str:
    """Markdown."""
    rows = [
        "| line | what | ours | peer | ratio | before | target | met | note |",
        "|---|---|--:|--:|--:|--:|---|---|---|",
    ]
    before = json.loads((HERE / "before.json").read_text())  # what -> ratio, of version 0.2.0
    for x in lines:
        if x.met is None and x.target.startswith(">=") and x.ratio is not None:
            x.met = x.ratio >= float(x.target.strip(">= x"))
        number = "{:.0f}" if x.unit == "MB" else "{:.1f}" if x.unit == "tok/s" else "{:.2f}"
        cells = [
            x.line,
            x.what,
            f"{number.format(x.ours)} {x.unit}",
            "" if x.peer is None else f"{number.format(x.peer)} {x.unit}",
            "" if x.ratio is None else f"{x.ratio:.2f}",
            f"{before[x.what]:.2f}" if x.what in before else "",
            x.target,
            {True: "yes", False: "no", None: ""}[x.met],
            x.note,
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


NAMES = (
    "sweep steered bridge contrast answers cold_start peaks limits panel waits own scoring large"
).split()


def random_model(shape: dict[str, Any], folder: str, device: str, dtype: torch.dtype) -> Any:
    """(bridge, plain transformers model) of a shape, with random weights and MODEL's tokenizer."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.for_model(**shape, vocab_size=len(tokenizer))
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        with torch.device(device):
            made.append(AutoModelForCausalLM.from_config(config, dtype=dtype).eval())
    bridge = TransformerBridge.boot_transformers(
        folder, hf_model=made[0], tokenizer=tokenizer, dtype=dtype, device=device
    )
    return bridge.eval().requires_grad_(False), made[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of less work: does it run?")
    parser.add_argument("--only", nargs="*", help=f"some of: {', '.join(NAMES)}, growth")
    parser.add_argument("--output", type=Path, help="folder for what is written (default: here)")
    parser.add_argument("--device", default="cpu", help='"cuda" times a GPU, in bfloat16')
    parser.add_argument("--random", choices=SHAPES, help="random weights of this model's shapes")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # a process of line 8
    arguments = parser.parse_args()
    tqdm.__init__ = _silent(tqdm.__init__)  # type: ignore[method-assign]
    special = arguments.random or arguments.device != "cpu"  # printed, unless --output says where
    bench = Bench(arguments.quick, arguments.device, arguments.random)
    if arguments.peak:
        print(bench.peak(*arguments.peak))
        return
    chosen = arguments.only or (RANDOM if special else [*NAMES, "growth"])
    output = arguments.output or (None if arguments.quick or special else HERE)
    path = output and output / "results.json"
    results: dict[str, Any] = {"setting": "", "lines": [], "growth": {}}
    if path and path.exists() and arguments.only:
        results = json.loads(path.read_text())
    rounds = f"{bench.rounds} alternating run{'s' * (bench.rounds > 1)}"
    where = torch.cuda.get_device_name() if bench.device != "cpu" else machine()
    kind = str(bench.dtype).removeprefix("torch.")
    heading = f"{bench.name}, {kind}; {where}. Medians of {rounds}; ratio = peer / ours."
    results["setting"] = heading
    for name in [n for n in NAMES if n in chosen]:
        found = []
        for line in getattr(bench, name)():
            found.append(replace(line, part=name))
            print(table(found[-1:]).splitlines()[-1], flush=True)
        others = [x for x in results["lines"] if x["part"] != name]
        results["lines"] = others + [asdict(x) | {"ratio": x.ratio} for x in found]
        results["lines"].sort(key=lambda x: NAMES.index(x["part"]))
        if output:
            write(output, results)  # what has been measured stays, whatever comes next
    if output and "growth" in chosen:
        results["growth"] = bench.growth(output / "growth.png")
        write(output, results)


def write(output: Path, results: dict[str, Any]) -> None:
    """results.json, and README.md with its table."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = [Line(**{k: v for k, v in x.items() if k != "ratio"}) for x in results["lines"]]
    text = (HERE / "README.md").read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    body = f"{BEGIN}\n{results['setting']}\n\n{table(lines)}\n{END}"
    (output / "README.md").write_text(head + body + tail)


def _silent(original: Any) -> Any:
    """The peers' progress bars are hushed: they would end up in the table."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "disable": True})

    return init


if __name__ == "__main__":
    main()
