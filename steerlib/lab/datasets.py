"""The data that ships with this repository (``data/``, described in ``data/README.md``), public
sets by their address, and contrast pairs made from either."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

from ..models.packaged import MODELS
from ..tokens import chat_prompt, encode, key_token

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge


def folder() -> Path:
    """Where the data is: ``STEERLIB_DATA``, or ``data/`` of the checkout, or the copy that an
    installed package carries."""
    if chosen := os.environ.get("STEERLIB_DATA"):
        return Path(chosen)
    package = Path(__file__).parents[1]
    # In an installed package the folder beside it belongs to whoever put it there.
    here = package.parent if (package.parent / "pyproject.toml").is_file() else None
    return here / "data" if here else package / "_data"


def result_path(kind: str, model: str) -> Path:
    """Where measurements of a kind are kept for a model; a hub's name has a slash."""
    return folder() / "results" / f"{kind}_{model.replace('/', '--')}.csv"


def result_paths(kind: str) -> dict[str, Path]:
    """Models in which a kind of measurement was made, the smallest first, and its file."""
    found = {
        path.stem.removeprefix(f"{kind}_").replace("--", "/"): path
        for path in sorted((folder() / "results").glob(f"{kind}_*.csv"))
    }
    known = list(MODELS)
    order = sorted(found, key=lambda m: known.index(m) if m in MODELS else len(known))
    return {model: found[model] for model in order}


def load(name: str) -> pd.DataFrame:
    """A table of ``data/`` by name, such as ``demonstrations``; spaces and empty cells as written.

    Raises:
        ValueError: no such table, or the file is damaged (rows of different length).
    """
    import pandas as pd

    path = folder() / f"{name}.csv"
    if not path.is_file():
        known = sorted(p.stem for p in folder().glob("*.csv"))
        raise ValueError(f"There is no table {name!r} in {folder()}; there are {', '.join(known)}.")
    try:
        table = pd.read_csv(path, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    # A file cut off in the middle of a row leaves empty cells where numbers or text belong.
    if table.empty or path.read_bytes()[-1:] != b"\n":
        raise ValueError(f"{path} is damaged: it has no rows, or its last line is cut off.")
    return table


def words(name: str) -> list[str]:
    """A word list of ``data/`` by name, such as ``wedding`` for ``wedding_words.txt``.

    Raises:
        ValueError: no such list.
    """
    path = folder() / f"{name}_words.txt"
    if not path.is_file():
        known = sorted(p.stem.removesuffix("_words") for p in folder().glob("*_words.txt"))
        raise ValueError(f"There is no word list {name!r}; there are {', '.join(known)}.")
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def code_switches() -> list[tuple[str, str]]:
    """Pairs (sentence that starts in English and goes on in French, its English original).

    For every sentence of ``codeswitch`` and every i, the first i fragments are English and the
    rest French; the French vector is the sum of the activation additions of all pairs. Source:
    Turner et al. 2023, comments on its demonstration 13.
    """
    pairs = []
    for _, fragments in load("codeswitch").groupby("sentence"):
        english, french = list(fragments.english), list(fragments.french)
        for i in range(len(english)):
            pairs.append((" ".join(english[:i] + french[i:]), " ".join(english)))
    return pairs


# ---------------------------------------------------------------- public sets, by their address

# Read as the files that their authors publish, not with the `datasets` package: the hub does not
# have the first, and of the second it has a copy without the column "Best Incorrect Answer".

FACTS = (
    "https://raw.githubusercontent.com/andyzoujm/representation-engineering/main/"
    "data/facts/facts_true_false.csv"
)
TRUTHFUL_QA = "https://raw.githubusercontent.com/sylinrl/TruthfulQA/main/TruthfulQA.csv"


def facts(source: str | os.PathLike[str] = FACTS) -> pd.DataFrame:
    """True and false claims of representation-engineering, with the columns of ``claims``.

    The set repeats some claims, and has not as many true as false ones: give `contrast_pairs` an
    ``n``.

    Args:
        source: an address, or the file of a copy.

    Raises:
        OSError: it cannot be read (no network).
        ValueError: what stands there is another table.

    Source: the honesty repository, "Choosing datasets".
    """
    table = _public("facts of representation-engineering", source, ["statement", "label"])
    table = table.drop_duplicates("statement", ignore_index=True)
    names = [f"f{i:03}" for i in range(len(table))]
    columns = {"id": names, "pair": names, "domain": "facts", "claim": table.statement}
    return table.assign(**columns)[[*columns, "label"]]


def truthful_qa(
    categories: Sequence[str] = ("Misconceptions", "Superstitions"),
    source: str | os.PathLike[str] = TRUTHFUL_QA,
) -> pd.DataFrame:
    """Questions of TruthfulQA, with the columns of ``misconceptions``; sides alternate.

    Args:
        categories: those whose names begin so.
        source: an address, or the file of a copy.

    Raises:
        OSError: it cannot be read (no network).
        ValueError: what stands there is another table, or no category fits.
    """
    import pandas as pd

    wanted = ["Category", "Question", "Best Answer", "Incorrect Answers"]
    table = _public("TruthfulQA", source, wanted)
    chosen = table[table.Category.str.startswith(tuple(categories))].reset_index(drop=True)
    if chosen.empty:
        known = ", ".join(sorted(set(table.Category)))
        raise ValueError(f"TruthfulQA has no category {list(categories)}; there are {known}.")
    wrong = chosen["Incorrect Answers"].str.split(";").str[0].str.strip()
    return pd.DataFrame(
        {
            "id": [f"t{i:03}" for i in range(len(chosen))],
            "question": chosen.Question,
            "correct": chosen["Best Answer"],
            "popular_wrong": chosen.get("Best Incorrect Answer", wrong),
            "side": ["AB"[i % 2] for i in range(len(chosen))],
            "category": chosen.Category,
        }
    )


def _public(name: str, source: str | os.PathLike[str], columns: list[str]) -> pd.DataFrame:
    """A public table with these columns, from its address or a file."""
    import pandas as pd

    where = os.fspath(source)
    try:
        if "://" in where:
            with urlopen(where, timeout=30) as answer:
                content = answer.read()
        else:
            content = Path(where).read_bytes()
    except (OSError, HTTPException) as error:
        raise OSError(
            f"The {name} could not be read from {where} ({error}). They are not part of this "
            "repository: connect to the network, or give source= the file of a copy."
        ) from error
    try:
        table = pd.read_csv(io.BytesIO(content), keep_default_na=False, encoding="utf-8-sig")
        if missing := [c for c in columns if c not in table]:
            raise ValueError(f"it has no column {', '.join(missing)}")
    except ValueError as error:  # also what pandas and the decoder raise
        raise ValueError(f"At {where} is not the {name}: {error}.") from error
    return table


# ---------------------------------------------------------------- questions and contrast pairs


@dataclass(frozen=True, eq=False)
class ContrastPairs(Sequence[tuple[str, str]]):
    """Questions, each answered honestly and dishonestly; made by `contrast_pairs`.

    As a sequence it holds text pairs (honest, dishonest), as `SteeringVector.from_pairs` takes
    them; ``capture_pairs(model, pairs.prefixes, pairs.endings)`` runs each question once.

    Attributes:
        prefixes: everything before the key token, one text a question.
        endings: the rest, honest answer first, two texts a question.
        labels: one row a text, in the order of ``endings``: id, pair (ids that belong together: a
            claim and its twin), truth (of the claim), order (of the options, see `questions`),
            label (the answer, A or B), meaning (whether that answer says "true"), honest. Truth
            and meaning are missing where there is no claim.
        position: of the key token, the A or B: -1 where nothing is behind it.
        options: the key token's text for A and for B, as `choice_probabilities` takes it.
        ids: token ids (honest, dishonest) of each pair's whole texts, as `encode` gives them.
        n_shared: how many tokens both texts of a pair have in common at the start, BOS included;
            the key token is the next one.
    """

    prefixes: list[str]
    endings: list[tuple[str, str]]
    labels: pd.DataFrame
    position: int
    options: tuple[str, str]
    ids: list[tuple[list[int], list[int]]]
    n_shared: list[int]

    def __len__(self) -> int:
        return len(self.prefixes)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return tuple(self.prefixes[index] + ending for ending in self.endings[index])


def questions(table: pd.DataFrame, both_orders: bool = False) -> pd.DataFrame:
    """Two-way questions from ``claims``, ``misconceptions`` or ``dilemmas``, or their like.

    Args:
        both_orders: ask every question twice, the second time with the two choices exchanged
            (right behind the first). Only then can what an answer says be told from its label.

    Returns:
        One row per row of ``table``, or two: id, pair, truth (missing where there is no claim),
        text (the question with its two choices, up to "Answer:"), a, b (the choices), honest
        (A or B), order (``given``: of claims, A is True; ``swapped``).

    Raises:
        ValueError: unknown columns, or labels that are neither 1 nor 0, neither A nor B.
    """
    import pandas as pd

    known = {
        "claim": ("label", {"1": "A", "0": "B", "True": "A", "False": "B"}),
        "question": ("side", {"A": "A", "B": "B"}),
        "situation": ("honest", {"A": "A", "B": "B"}),
    }
    kind = next((k for k, (key, _) in known.items() if {k, key} <= set(table)), None)
    if kind is None:
        raise ValueError(
            "Questions are made from tables with the columns claim and label; question, correct, "
            f"popular_wrong and side; or situation, option_a, option_b and honest: got "
            f"{', '.join(map(str, table.columns))}."
        )
    key, labels = known[kind]
    honest = table[key].astype(str).map(labels)
    if honest.isna().any():
        found = sorted(set(table[key][honest.isna()].astype(str)))
        raise ValueError(f"Column {key} must hold {' or '.join(labels)}, got {found[:5]}.")
    asked, truth, first = table[kind].astype(str), None, honest == "A"
    if kind == "claim":
        truth = first.tolist()
        asked = 'Is the following claim true or false? "' + asked + '"'
        a, b = pd.Series("True", table.index), pd.Series("False", table.index)
    elif kind == "question":
        a = table.correct.where(first, table.popular_wrong)
        b = table.popular_wrong.where(first, table.correct)
    else:
        a, b = table.option_a, table.option_b
    names = table["id"] if "id" in table else pd.Series(range(len(table)), table.index)
    pair = table["pair"] if "pair" in table else names
    columns = {"id": names, "pair": pair, "truth": truth, "text": asked, "a": a, "b": b}
    given = pd.DataFrame({**columns, "honest": honest, "order": "given"}).reset_index(drop=True)
    if both_orders:
        other = {"a": given.b, "b": given.a, "honest": given.honest.map({"A": "B", "B": "A"})}
        given = pd.concat([given, given.assign(**other, order="swapped")])
        given = given.sort_index(kind="stable").reset_index(drop=True)
    choices = "\n\nChoices:\n(A) " + given.a + "\n(B) " + given.b + "\n\nAnswer:"
    return given.assign(text="Question: " + given.text + choices)


def contrast_pairs(
    model: TransformerBridge,
    table: pd.DataFrame,
    n: int | None = None,
    *,
    both_orders: bool = False,
    system: str | None = None,
    prefill: str = "(",
    closing: str = "",
    seed: int = 0,
) -> ContrastPairs:
    """Every question with its honest and its dishonest answer, exactly counterbalanced.

    Both classes hold every question once, and as many answers A as B; with claims, therefore, as
    many true as false ones. Without that the mean difference is the label, not honesty. In both
    orders of the options label, meaning and honesty of an answer are crossed: each of the eight
    combinations occurs equally often.

    Args:
        model: its tokenizer decides what the key token is: the A or B, or "(A" where that is one.
        table: ``claims``, ``misconceptions``, ``dilemmas``, or their like (see `questions`).
        n: draw so many questions at random, half of each kind, rows of one ``pair`` together
            where they can be; all rows by default.
        both_orders: ask each of them in both orders, so that there are ``2 * n`` pairs.
        system, prefill: as for `chat_prompt`.
        closing: text behind the key token, such as ")".

    Raises:
        ValueError: the rows cannot be balanced; repeated questions; a tokenizer for which the
            two answers differ in more than one token.

    Source: the honesty repository, "Choosing datasets".
    """
    import pandas as pd

    asked = _balanced(questions(table, both_orders), n, seed)
    prefixes: list[str] = []
    endings, rows, ids, n_shared = [], [], [], []
    where: tuple[int, int] | None = None  # key token: its position, and where it starts in the text
    for item in asked.itertuples():
        start = chat_prompt(model, item.text, system, prefill)
        texts = {label: start + label + closing for label in "AB"}
        found = key_token(model, texts, len(start))
        if where is not None and (found[0], found[1] - len(start)) != where:
            raise ValueError(f"The key token stands elsewhere in {start!r} than in other prompts.")
        where = found[0], found[1] - len(start)
        prefixes.append(start[: found[1]])
        order = "AB" if item.honest == "A" else "BA"
        endings.append((texts[order[0]][found[1] :], texts[order[1]][found[1] :]))
        ids.append((encode(model, texts[order[0]]), encode(model, texts[order[1]])))
        n_shared.append(len(ids[-1][0]) + found[0])
        for o in order:
            honest = o == item.honest
            meaning = None if item.truth is None else item.truth == honest
            rows.append((item.id, item.pair, item.truth, item.order, o, meaning, honest))
    assert where is not None
    columns = ["id", "pair", "truth", "order", "label", "meaning", "honest"]
    labels = pd.DataFrame(rows, columns=columns)
    key = endings[0] if labels.label[0] == "A" else endings[0][::-1]
    options = tuple(text.removesuffix(closing) for text in key)
    both = (options[0], options[1])
    return ContrastPairs(prefixes, endings, labels, where[0], both, ids, n_shared)


def _balanced(asked: pd.DataFrame, n: int | None, seed: int) -> pd.DataFrame:
    """``asked``, or ``n`` of its questions, with as many honest answers A as B in each order."""
    import pandas as pd

    if len(swapped := asked[asked.order == "swapped"]):
        given = asked[asked.order == "given"].assign(row=range(len(swapped)))
        if n is not None or given.truth.notna().any():  # else both orders balance themselves
            given = _balanced(given, n, seed)
        other = swapped.iloc[given.row]
        both = pd.concat([given.drop(columns="row").set_axis(other.index), other])
        return both.loc[other.index].drop_duplicates().reset_index(drop=True)
    twice = asked[asked.text.duplicated()]
    if len(twice):
        raise ValueError(
            f"{len(twice)} questions occur more than once, {twice.text.iloc[0]!r} among them: "
            "every one may occur once."
        )
    kinds = {s: f"questions with the honest answer {s}" for s in "AB"}
    if asked.truth.notna().any():
        kinds = {"A": "true claims", "B": "false claims"}
    has = {side: int((asked.honest == side).sum()) for side in "AB"}
    count = " and ".join(f"{has[side]} {kinds[side]}" for side in "AB")
    if n is None:
        surplus = abs(has["A"] - has["B"])
        if surplus or not len(asked):
            most = max(has, key=lambda side: has[side])
            raise ValueError(
                f"Contrast pairs must be balanced, got {count}: {surplus} {kinds[most]} too many. "
                f"With n={2 * min(has.values())}, as many of each are drawn."
                if surplus
                else "Contrast pairs need at least one question of each kind, got none."
            )
        return asked
    short = {side: n // 2 - has[side] for side in "AB" if has[side] < n // 2}
    if n < 2 or n % 2 or short:
        how = ", ".join(f"{k} {kinds[side]} too few" for side, k in short.items())
        raise ValueError(
            f"n={n} contrast pairs cannot be balanced from {count}: {how or 'n must be even'}."
        )
    groups = asked.pair.drop_duplicates().sample(frac=1, random_state=seed)
    rank = asked.pair.map(dict(zip(groups, range(len(groups)), strict=True)))
    order = asked.loc[rank.sort_values(kind="stable").index]
    return order.groupby("honest").head(n // 2).reset_index(drop=True)
