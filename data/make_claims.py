"""Write claims.csv: hand-written pairs (claims_written.csv) plus pairs drawn from public facts.

    python data/make_claims.py            # rewrites data/claims.csv, always the same bytes
    python data/make_claims.py --check    # exits 1 if the committed file differs

Capitals, currencies, continents and areas come from `countryinfo`, element symbols and
atomic numbers from `periodictable`. Only the choice of well-known countries and elements,
and the wording, is made here.

A false twin is never invented: it takes the answer of another row of the same group (another
capital of the same continent, another element's symbol). Within a group every answer is
therefore used equally often in a true and in a false claim, and no word gives the label away.
"""

from __future__ import annotations

import argparse
import csv
import io
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 0
COLUMNS = ["id", "pair", "domain", "claim", "label"]
Pair = tuple[str, str, str]  # domain, true claim, false claim

# The countries of claims_eval.csv (Iceland, Bulgaria, Jordan, Croatia, ...) are left out.
CAPITALS = {
    "Europe": "France, Germany, Italy, Spain, Portugal, Greece, Austria, Poland, Sweden, Norway, "
    "Finland, Denmark, Ireland, Hungary, Belgium, Romania",
    "Asia": "Japan, China, India, South Korea, Thailand, Vietnam, Iran, Iraq, Pakistan, "
    "Saudi Arabia, Nepal, Mongolia, Malaysia, Afghanistan",
    "Africa": "Egypt, Kenya, Ghana, Ethiopia, Senegal, Nigeria",
    "South America": "Argentina, Brazil, Peru, Colombia, Venezuela, Chile, Uruguay, Ecuador",
    "North America": "Canada, Jamaica, Cuba",
    "Oceania": "Australia, New Zealand",
}
CONTINENTS = {
    "Africa": "Nigeria, Ghana, Senegal, Ethiopia, Algeria, Kenya",
    "Asia": "Japan, Vietnam, Nepal, Mongolia, Pakistan, Thailand",
    "Europe": "Sweden, Poland, Portugal, Hungary, Belgium, Ireland",
}
CURRENCIES = {
    "Asia": "Japan JPY yen, India INR rupee, South Korea KRW won, Thailand THB baht, "
    "China CNY yuan, Vietnam VND dong",
    "Europe": "Sweden SEK krona, Poland PLN zloty, Hungary HUF forint, Romania RON leu",
    "Africa": "Nigeria NGN naira, Ghana GHS cedi, Kenya KES shilling, Algeria DZD dinar",
    "Latin America": "Brazil BRL real, Mexico MXN peso, Peru PEN sol",
}
AREAS = (  # at least two to one
    "Canada Mexico, Brazil Argentina, India Pakistan, China India, France Portugal, Spain Ireland, "
    "Germany Belgium, Algeria Kenya, Peru Ecuador, Japan South Korea, Argentina Chile, "
    "Sweden Denmark, Mongolia Nepal, Australia New Zealand"
)
SYMBOLS = (
    "hydrogen, helium, carbon, nitrogen, oxygen, fluorine, neon, sodium, magnesium, aluminum, "
    "silicon, phosphorus, sulfur, chlorine, potassium, calcium, iron, copper, zinc, silver, gold, "
    "mercury, lead, tin"
)
NUMBERS = "hydrogen, helium, lithium, carbon, nitrogen, oxygen, neon, sodium, iron"
ORDER = "helium oxygen, carbon iron, lithium neon, silver gold, oxygen calcium, sodium copper"


def swapped(answer: Mapping[str, object], rng: random.Random) -> dict[str, object]:
    """Each key with the answer of another key: one cycle through all keys, in seeded order."""
    order = rng.sample(list(answer), len(answer))
    wrong = {k: answer[other] for k, other in zip(order, order[1:] + order[:1], strict=True)}
    for k in answer:
        if wrong[k] == answer[k]:
            raise ValueError(f"The false twin of {k} would be true: {answer[k]}")
    return wrong


def filled(
    domain: str, forms: list[str], right: Mapping[str, object], wrong: Mapping[str, object]
) -> Iterator[Pair]:
    """One pair for each key, taking the sentence forms in turn."""
    for i, key in enumerate(right):
        form = forms[i % len(forms)]
        yield domain, form.format(key, right[key]), form.format(key, wrong[key])


def compared(
    domain: str, form: str, couples: Iterable[tuple[str, str]], more: str, less: str
) -> Iterator[Pair]:
    """One pair for each (larger, smaller); every other time it starts from the smaller."""
    for i, (one, other) in enumerate(couples):
        if i % 2:
            yield domain, form.format(other, less, one), form.format(other, more, one)
        else:
            yield domain, form.format(one, more, other), form.format(one, less, other)


def country_pairs(rng: random.Random) -> Iterator[Pair]:
    """Capitals, continents, currencies and areas."""
    from countryinfo import CountryInfo

    forms = [
        "The capital of {0} is {1}.",
        "{1} is the capital of {0}.",
        "{0} has its capital in {1}.",
    ]
    for group in CAPITALS.values():
        capital = {k: CountryInfo(k).capital() for k in group.split(", ")}
        yield from filled("capitals", forms, capital, swapped(capital, rng))

    continent = {k: c for c, group in CONTINENTS.items() for k in group.split(", ")}
    for k, c in continent.items():
        if CountryInfo(k).region() != c:
            raise ValueError(f"countryinfo places {k} in {CountryInfo(k).region()}, not in {c}")
    another = {"Africa": "Asia", "Asia": "Europe", "Europe": "Africa"}
    forms = ["{0} is a country in {1}.", "The country of {0} lies in {1}."]
    yield from filled("continents", forms, continent, {k: another[c] for k, c in continent.items()})

    forms = ["The currency of {0} is the {1}.", "People in {0} pay with the {1}."]
    for group in CURRENCIES.values():
        currency = {}
        for k, code, word in (entry.rsplit(" ", 2) for entry in group.split(", ")):
            if code not in CountryInfo(k).currencies():
                raise ValueError(f"countryinfo does not list {code} as a currency of {k}")
            currency[k] = word
        yield from filled("currencies", forms, currency, swapped(currency, rng))

    couples = [(one, other) for one, other in (c.split(" ", 1) for c in AREAS.split(", "))]
    for one, other in couples:
        large, small = CountryInfo(one).area(), CountryInfo(other).area()
        if not large or not small or large < 2 * small:
            raise ValueError(f"{one} is not twice as large as {other}")
    yield from compared("areas", "{0} is {1} in area than {2}.", couples, "larger", "smaller")


def element_pairs(rng: random.Random) -> Iterator[Pair]:
    """Symbols, atomic numbers and the order of elements."""
    import periodictable

    element = {e.name: e for e in periodictable.elements}

    symbol = {k: element[k].symbol for k in SYMBOLS.split(", ")}
    forms = [
        "The chemical symbol for {0} is {1}.",
        "{1} is the chemical symbol of {0}.",
        "In chemical formulas, {0} is written as {1}.",
    ]
    yield from filled("elements", forms, symbol, swapped(symbol, rng))

    number = {k: element[k].number for k in NUMBERS.split(", ")}
    forms = [
        "The atomic number of {0} is {1}.",
        "In the periodic table, {0} is element number {1}.",
    ]
    yield from filled("elements", forms, number, swapped(number, rng))

    couples = [(one, other) for one, other in (c.split() for c in ORDER.split(", "))]
    for one, other in couples:
        if element[one].number >= element[other].number:
            raise ValueError(f"{one} does not come before {other}")
    form = "In the periodic table, {0} comes {1} {2}."
    yield from compared("elements", form, couples, "before", "after")


def written_pairs() -> Iterator[Pair]:
    """The pairs of claims_written.csv."""
    with open(HERE / "claims_written.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield row["domain"], row["true"], row["false"]


def build() -> str:
    """The text of claims.csv."""
    rng = random.Random(SEED)
    pairs = [*written_pairs(), *country_pairs(rng), *element_pairs(rng)]
    # Mixed, so that a part of the file covers all domains; true and false lead in turn, so that
    # neither the order within a pair nor the row number says anything about the label.
    rng.shuffle(pairs)
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(COLUMNS)
    for i, (domain, true, false) in enumerate(pairs):
        rows = [(f"c{i:03d}t", f"p{i:03d}", domain, true, 1)]
        rows.insert(1 - i % 2, (f"c{i:03d}f", f"p{i:03d}", domain, false, 0))
        table.writerows(rows)
    return out.getvalue()


def main() -> None:
    """Write the file, or compare with it."""
    parser = argparse.ArgumentParser(description="Write data/claims.csv.")
    parser.add_argument("--check", action="store_true", help="only compare with the file")
    check = parser.parse_args().check
    try:
        text, path = build(), HERE / "claims.csv"
    except ModuleNotFoundError as error:
        sys.exit(f"This needs the package {error.name}: pip install 'steerlib[honesty]'.")
    if not check:
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"{path.name}: {text.count(chr(10)) - 1} claims")
    elif path.read_text(encoding="utf-8") != text:
        sys.exit("claims.csv is not what this script writes")


if __name__ == "__main__":
    main()
