"""`SteeringVector`: what is added to the residual stream, and where it came from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .activations import capture, capture_groups, check_layers, check_site
from .directions import fit_direction, parse_method
from .formats import gguf, tensors
from .tokens import common_prefix, encode, first_ids, single_token

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

PLACES = ("front", "middle", "back", "prompt", "generated", "all")


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """For each layer a float32 tensor ``[n_positions, d_model]``, to be added to the stream.

    ``n_positions == 1`` makes it a direction. ``a + b``, ``a - b``, ``-a``, ``5 * a`` and ``a / 2``
    work layer by layer; layers that only one operand has are kept. With vectors that act at the
    front, the shorter one counts as zero beyond its end.

    Attributes:
        layers: layer number -> tensor.
        site: ``resid_pre`` or ``resid_post``.
        at: where a bare vector acts when it is used as a condition (see `interventions.Add`).
        meta: where it came from: model, prompts, method.

    Vectors compare by identity: two of equal numbers are two vectors.

    Source: Turner et al. 2023, "How activation additions work"; the honesty repository, "How to
    identify the vectors". The operators follow repeng's control vectors.
    """

    layers: Mapping[int, torch.Tensor]
    site: str = "resid_pre"
    at: str = "front"
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_site(self.site)
        if self.at not in PLACES:
            raise ValueError(f"at={self.at!r} is unknown: use one of {', '.join(PLACES)}.")
        if not self.layers:
            raise ValueError("A steering vector needs at least one layer.")
        shapes = {tuple(t.shape) for t in self.layers.values()}
        if len(shapes) > 1 or any(len(s) != 2 or 0 in s for s in shapes):
            raise ValueError(
                "Every layer of a steering vector needs the same shape [n_positions, d_model], "
                f"got {sorted(shapes)}."
            )
        for layer, tensor in self.layers.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"The vector at layer {layer} has NaN or infinite entries.")

    @property
    def n_positions(self) -> int:
        return next(iter(self.layers.values())).shape[0]

    @property
    def d_model(self) -> int:
        return next(iter(self.layers.values())).shape[1]

    def __repr__(self) -> str:
        name = self.meta.get("name", "SteeringVector")
        return (
            f"<{name}: {self.site}, layers {sorted(self.layers)}, {self.n_positions} position(s), "
            f"d_model {self.d_model}, at={self.at!r}>"
        )

    # ---------------------------------------------------------------- made from text

    @classmethod
    def from_prompts(
        cls,
        model: TransformerBridge,
        plus: str,
        minus: str | None = None,
        *,
        layer: int | Iterable[int],
        site: str = "resid_pre",
        pad: str = " ",
    ) -> SteeringVector:
        """Activation addition: the stream of ``plus`` minus that of ``minus``, token by token.

        The shorter prompt is padded on the right with the token ``pad``, so that both span the
        same positions (Turner et al. 2023, footnote 6). ``minus=""`` is therefore a prompt of pad
        tokens only; ``minus=None`` subtracts nothing, which leaves position 0 (BOS) in the vector.

        Args:
            layer: one block number or several; before which block, for ``resid_pre``.

        Returns:
            A vector with ``n_positions`` = tokens of the longer prompt, acting at the front.

        Raises:
            ValueError: unknown layer or site, empty ``plus``, or ``pad`` is not one token.
        """
        plus_ids = encode(model, plus)
        minus_ids = None
        if minus is not None:
            try:
                pad_ids = [single_token(model, pad)]
            except ValueError as error:
                raise ValueError(f"The padding has to be one token: {error}") from None
            minus_ids = encode(model, minus) if minus else encode(model, pad)
            length = max(len(plus_ids), len(minus_ids))
            plus_ids = plus_ids + pad_ids * (length - len(plus_ids))
            minus_ids = minus_ids + pad_ids * (length - len(minus_ids))
        wanted = check_layers(model, layer)
        group = [plus_ids] if minus_ids is None else [plus_ids, minus_ids]
        acts = capture_groups(model, [group], wanted, range(len(plus_ids)), site)[0]
        diff = acts[0] if minus_ids is None else acts[0] - acts[1]
        if minus_ids is not None:
            # Shared first tokens (BOS at least) have the same stream in both, attention being
            # causal: exactly zero, where batched kernels may leave rounding noise.
            diff[:, : common_prefix([plus_ids, minus_ids])] = 0
        meta = {
            "name": repr(plus) if minus is None else f"{plus!r} - {minus!r}",
            "model": model.cfg.model_name,
            "method": "from_prompts",
            "plus": plus,
            "minus": minus,
            "tokens": [model.tokenizer.convert_ids_to_tokens(g) for g in group],
        }
        return cls(dict(zip(wanted, diff, strict=True)), site, "front", meta)

    @classmethod
    def from_pairs(
        cls,
        model: TransformerBridge,
        pairs: Sequence[tuple[str, str]],
        *,
        layers: int | Iterable[int] | None = None,
        method: str = "mean",
        component: int = 0,
        position: int = -1,
        site: str = "resid_post",
    ) -> SteeringVector:
        """A direction per layer from contrast pairs ``(positive, negative)``.

        Args:
            method, component: as for `directions.fit_direction`: ``mean``, ``pca`` (or ``pc1``,
                ``pc2``, ...), ``probe`` (or ``logistic``), ``mass-mean``.
            position: the token at which to read; negative counts from each prompt's end.

        Returns:
            A direction (``n_positions == 1``), acting at ``generated``. Its sign makes the
            positive prompts project higher on average.

        Raises:
            ValueError: no pairs, not pairs, unknown method or component, unknown layer.
        """
        wanted = check_layers(model, layers)
        method, component = parse_method(method, component)
        items = [tuple(pair) if not isinstance(pair, str) else (pair,) for pair in pairs]
        odd = next((i for i, pair in enumerate(items) if len(pair) != 2), None)
        if not items or odd is not None:
            found = (
                "no pair at all" if odd is None else f"{len(items[odd])} prompt(s) in pair {odd}"
            )
            raise ValueError(
                f"Contrast pairs must be balanced, one positive and one negative each: {found}."
            )
        groups = [[encode(model, pos), encode(model, neg)] for pos, neg in items]
        acts = capture_groups(model, groups, wanted, position, site)
        if torch.equal(acts[:, 0], acts[:, 1]):
            raise ValueError(
                f"The two prompts of every pair are the same up to position {position}: there is "
                "no difference to take."
            )
        meta = {
            "name": f"{method}{f'[{component}]' if method == 'pca' else ''} of {len(items)} pairs",
            "model": model.cfg.model_name,
            "method": method,
            "component": component,
            "position": position,
            "n_pairs": len(items),
        }
        vectors = {
            layer: fit_direction(acts[:, :, i], method, component)[None].float()
            for i, layer in enumerate(wanted)
        }
        return cls(vectors, site, "generated", meta)

    @classmethod
    def from_mean(
        cls,
        model: TransformerBridge,
        prompts: Sequence[str],
        *,
        layers: int | Iterable[int] | None = None,
        position: int = -1,
        site: str = "resid_post",
    ) -> SteeringVector:
        """The mean stream of some prompts: a point, for ``Ablate(to="mean")`` and `Affine`.

        Args:
            position: the token at which to read; negative counts from each prompt's end.

        Returns:
            One position per layer, in the stream's own units.

        Raises:
            ValueError: no prompts, unknown layer, a position that a prompt lacks.
        """
        wanted = check_layers(model, layers)
        acts = capture(model, prompts, wanted, position, site).double().mean(0).float()
        meta = {
            "name": f"mean of {len(prompts)} prompts",
            "model": model.cfg.model_name,
            "method": "from_mean",
            "position": position,
        }
        return cls(dict(zip(wanted, acts[:, None], strict=True)), site, "generated", meta)

    @classmethod
    def random_like(cls, vector: SteeringVector, seed: int = 0) -> SteeringVector:
        """Gaussian noise with the norm of ``vector`` at every layer and position.

        Source: Turner et al. 2023, "Adding a random vector doesn't change much".
        """
        generator = torch.Generator().manual_seed(seed)
        noise = {}
        for layer in sorted(vector.layers):
            v = vector.layers[layer]
            draw = torch.randn(v.shape, generator=generator)
            noise[layer] = draw / draw.norm(dim=-1, keepdim=True) * v.norm(dim=-1, keepdim=True)
        meta = {
            "name": f"random like {vector.meta.get('name', 'a vector')}",
            "model": vector.meta.get("model"),
            "method": "random_like",
            "seed": seed,
        }
        return replace(vector, layers=noise, meta=meta)

    @classmethod
    def unrelated_like(
        cls, model: TransformerBridge, vector: SteeringVector, text: str, pad: str = " "
    ) -> SteeringVector:
        """The vector of an unrelated text, with the norm of ``vector`` at every layer and position.

        For a vector that acts at the front, the text (repeated or cut to its length in tokens)
        minus a prompt of ``pad`` tokens, position by position (minus nothing where both begin with
        the same tokens, such as BOS); for a direction, the stream at the last token of the text
        minus that at the pad token. Unlike noise it is made of what texts
        are made of: a control against "any text would have done it".

        Raises:
            ValueError: empty text, or ``pad`` is not one token.
        """
        n, layers = vector.n_positions, sorted(vector.layers)
        if vector.at == "front":
            body, ids = first_ids(model, text), encode(model, text)
            bos = ids[: len(ids) - len(body)]
            pair = [[*bos, *body * n][:n], [*bos, *[single_token(model, pad)] * n][:n]]
            acts = capture_groups(model, [pair], layers, range(n), vector.site)[0]
            difference = acts[0] - acts[1]
            # Where both are the same (BOS) a difference would be rounding noise, blown up.
            same = common_prefix(pair)
            difference[:, :same] = acts[0][:, :same]
        else:
            last = capture(model, [text, pad], layers, -1, vector.site)
            difference = (last[0] - last[1])[:, None].expand(-1, n, -1)
        matched = {}
        for layer, v in zip(layers, difference, strict=True):
            size = vector.layers[layer].norm(dim=-1, keepdim=True)
            matched[layer] = torch.nn.functional.normalize(v, dim=-1) * size
        meta = {
            "name": f"unrelated text {text[:20]!r} like {vector.meta.get('name', 'a vector')}",
            "model": model.cfg.model_name,
            "method": "unrelated_like",
            "plus": text,
        }
        return replace(vector, layers=matched, meta=meta)

    # ---------------------------------------------------------------- arithmetic

    def map(self, function: Any, **meta: Any) -> SteeringVector:
        """The vector with ``function`` applied to each layer's tensor."""
        layers = {layer: function(t) for layer, t in self.layers.items()}
        return replace(self, layers=layers, meta={**self.meta, **meta})

    def only(self, layers: int | Iterable[int]) -> SteeringVector:
        """The same vector at some of its layers only. Raises ``KeyError`` for others."""
        wanted = [layers] if isinstance(layers, int) else list(layers)
        if missing := set(wanted) - set(self.layers):
            raise KeyError(f"{self!r} has no layer {min(missing)}.")
        return replace(self, layers={layer: self.layers[layer] for layer in wanted})

    def __mul__(self, coefficient: float) -> SteeringVector:
        if not math.isfinite(coefficient):
            raise ValueError(f"A coefficient must be a finite number, got {coefficient}.")
        return self.map(
            lambda t: t * coefficient,
            coefficient=coefficient * self.meta.get("coefficient", 1.0),
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> SteeringVector:
        return self * (1 / divisor)

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self + -other

    def __add__(self, other: SteeringVector) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        if (self.site, self.at, self.d_model) != (other.site, other.at, other.d_model):
            raise ValueError(
                f"Cannot add {other!r} to {self!r}: site, place of action and d_model must agree."
            )
        n = max(self.n_positions, other.n_positions)
        if self.n_positions != other.n_positions and self.at != "front":
            sizes = f"{self.n_positions} and {other.n_positions} positions"
            raise ValueError(f"Cannot add vectors of {sizes} that act at {self.at!r}.")
        zero = torch.zeros(n, self.d_model)
        layers = {}
        for layer in sorted({*self.layers, *other.layers}):
            total = zero.clone()
            for vector in (self, other):
                if layer in vector.layers:
                    total[: vector.n_positions] += vector.layers[layer]
            layers[layer] = total
        parts = [v._parts() for v in (self, other)]
        name = " + ".join(p.get("name", "?") for part in parts for p in part)
        model = (
            self.meta.get("model") if self.meta.get("model") == other.meta.get("model") else None
        )
        meta = {"name": name, "model": model, "method": "sum", "parts": [*parts[0], *parts[1]]}
        return SteeringVector(layers, self.site, self.at, meta)

    def _parts(self) -> list[dict[str, Any]]:
        """Where the summands came from, each with the coefficient it has by now."""
        if "parts" not in self.meta:
            return [dict(self.meta)]
        factor = self.meta.get("coefficient", 1.0)
        return [
            {**part, "coefficient": factor * part.get("coefficient", 1.0)}
            for part in self.meta["parts"]
        ]

    def norm(self) -> dict[int, torch.Tensor]:
        """L2 norm per position, ``[n_positions]``, for each layer."""
        return {layer: t.norm(dim=-1) for layer, t in self.layers.items()}

    def unit(self) -> SteeringVector:
        """Every layer and position scaled to length 1 (zero stays zero)."""
        return self.map(lambda t: torch.nn.functional.normalize(t, dim=-1), unit=True)

    def truncate(self, fraction: float, which: str = "first", seed: int = 0) -> SteeringVector:
        """Keep a fraction of the residual dimensions, zero the rest.

        Args:
            fraction: between 0 and 1; ``round(fraction * d_model)`` dimensions stay.
            which: ``first`` (the document's choice), ``last``, or ``random`` (drawn with ``seed``).

        Source: Turner et al. 2023, "Only modifying certain residual stream dimensions".
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"The fraction must lie between 0 and 1, got {fraction}.")
        d, k = self.d_model, round(fraction * self.d_model)
        if which == "first":
            keep = torch.arange(d) < k
        elif which == "last":
            keep = torch.arange(d) >= d - k
        elif which == "random":
            keep = torch.randperm(d, generator=torch.Generator().manual_seed(seed)) < k
        else:
            raise ValueError(f"which={which!r} is unknown: use first, last or random.")
        return self.map(lambda t: t * keep, fraction=fraction, which=which)

    # ---------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str], operator: str = "Add") -> None:
        """Write safetensors; the file appears whole or not at all.

        It says model, site, layers, place, normalisation (``unit``, or ``none``: the lengths are
        the vector's own), the ``operator`` it is meant for, and where it came from.
        """
        tensors.write(path, self.layers, self._says(operator))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        site: str | None = None,
        operator: str | None = None,
        model: TransformerBridge | None = None,
    ) -> SteeringVector:
        """Read a file written by `save`, or plain safetensors of others. Nothing is unpickled.

        Plain files have a tensor per layer, named by its number (see `formats.tensors`). A vector
        of steering-vectors becomes one, which says its site, by ``save_file({str(l): t for l, t in
        v.layer_activations.items()}, path, {"layer_type": v.layer_type})``.

        Args:
            site: where in a block it acts; needed for files that do not say it.
            site, operator, model: what the file has to fit, as far as it says.

        Raises:
            ValueError: the file is missing, damaged, or not a steering vector; it does not say its
                site; it says another site, operator, model, layers or d_model.
        """
        layers, says = tensors.read(path)
        return cls._from_file(path, layers, says, site, operator, model)

    def to_gguf(self, path: str | os.PathLike[str], model_hint: str | None = None) -> None:
        """Write a llama.cpp control vector (``--control-vector``); repeng reads it too.

        llama.cpp adds ``direction.l`` to the stream that leaves block l, l >= 1; a ``resid_pre``
        vector at layer l is therefore written as ``direction.(l-1)``. What `save` says stands there
        as well.

        Raises:
            ValueError: the vector has several positions, or would act before block 1 ends.
        """
        if self.n_positions != 1:
            raise ValueError(
                f"A control vector has one position, this vector has {self.n_positions}: "
                "llama.cpp adds the same vector at every position."
            )
        shift = 1 if self.site == "resid_pre" else 0
        if min(self.layers) - shift < 1:
            raise ValueError(
                "llama.cpp's control vectors begin after block 1: drop the layers "
                f"{[layer for layer in sorted(self.layers) if layer - shift < 1]} of {self.site}."
            )
        directions = {layer - shift: t[0] for layer, t in self.layers.items()}
        hint = str(model_hint or self.meta.get("model") or "unknown")
        gguf.write(path, directions, hint, self._says("Add"))

    @classmethod
    def from_gguf(
        cls,
        path: str | os.PathLike[str],
        *,
        site: str | None = None,
        model: TransformerBridge | None = None,
    ) -> SteeringVector:
        """Read a control vector of llama.cpp, of repeng, or written by `to_gguf`.

        Args:
            site: in which terms to take it; it acts behind the block that the file names, either
                way. ``resid_post``: ``direction.l`` is layer l; ``resid_pre``: it is layer l + 1.
                Needed for files of others, which cannot say what hook point they were made at.
            model: the model that it has to fit.

        Returns:
            A direction per layer, as long and with the sign as in the file, acting at ``all``
            positions, as in llama.cpp (from `to_gguf`: where it acted before).

        Raises:
            ValueError: the file is missing, damaged or no control vector; layers are missing; it
                does not say its site, or says another; it does not fit ``model``.
        """
        directions, says = gguf.read(path)
        shift = 1 if (site or says.get("site")) == "resid_pre" else 0
        layers = {block + shift: t for block, t in directions.items()}
        hint = says.pop("hint")
        if "meta" not in says:
            says["meta"] = json.dumps(
                {"name": Path(path).stem, "method": "from_gguf", "hint": hint}
            )
        return cls._from_file(path, layers, says, site, None, model)

    def _says(self, operator: str) -> dict[str, str]:
        """What a file says of the vector besides its numbers."""
        lengths = torch.stack(list(self.norm().values()))
        return {
            "site": self.site,
            "at": self.at,
            "layers": json.dumps(sorted(self.layers)),
            "model": str(self.meta.get("model") or "unknown"),
            "normalisation": "unit" if ((lengths - 1).abs() < 1e-4).all() else "none",
            "operator": operator,
            "meta": json.dumps(dict(self.meta)),
        }

    @classmethod
    def _from_file(
        cls,
        path: str | os.PathLike[str],
        layers: Mapping[int, torch.Tensor],
        says: Mapping[str, str],
        site: str | None,
        operator: str | None,
        model: TransformerBridge | None,
    ) -> SteeringVector:
        """The vector of a file, if it holds what it says, and says nothing but what is wanted."""
        for name, wanted in (("site", site), ("operator", operator)):
            if wanted is not None and says.get(name, wanted) != wanted:
                raise ValueError(f"{path} is for {name} {says[name]!r}, not {wanted!r}.")
        if (site := site or says.get("site")) is None:
            raise ValueError(
                f"{path} does not say where in a block it acts: give site='resid_post' (where the "
                "block ends: llama.cpp, repeng, steering-vectors) or site='resid_pre'."
            )
        try:
            meta = json.loads(says.get("meta", "{}"))
            if not isinstance(meta, dict):
                raise ValueError("its metadata make no sense")
            several = any(len(t) > 1 for t in layers.values())
            at = says.get("at", "front" if several else "all")
            vector = cls({layer: t.float() for layer, t in layers.items()}, site, at, meta)
            for name, held in vector._says("").items():
                if name in ("layers", "normalisation") and says.get(name, held) != held:
                    raise ValueError(f"it says {name} {says[name]}, but holds {held}")
        except ValueError as error:
            raise ValueError(f"{path} is not a steering vector file: {error}.") from error
        if model is not None:
            name, known = model.cfg.model_name, meta.get("model")
            said = f"made with {known}, " if known else ""
            fits = max(vector.layers) < model.cfg.n_layers and vector.d_model == model.cfg.d_model
            if not fits or known not in (None, name):
                raise ValueError(
                    f"{path} does not fit {name} ({model.cfg.n_layers} layers, d_model "
                    f"{model.cfg.d_model}): it is {said}layers {sorted(vector.layers)}, d_model "
                    f"{vector.d_model}."
                )
        return vector


class Control(NamedTuple):
    """The name of a matched control: its columns in a table.

    Attributes:
        family: ``random`` or ``unrelated``.
        control: the seed, or the unrelated text.
    """

    family: str
    control: str


# Each begins with another word, so that short vectors differ as well; none is about what the
# notebooks steer towards.
UNRELATED = (
    " gravel covers the narrow path behind the old railway station near the river",
    " pencils were sorted by length and put back into the wooden drawer",
    " thermometers on the roof are read twice a day by the students",
    " carpet in the hallway was replaced with grey tiles last autumn",
    " turbines at the dam turn slowly while the water level is low",
    " potatoes keep for months in a dark and dry cellar",
    " spreadsheets with more than a thousand rows open slowly on this computer",
    " bicycles are parked along the wall next to the main entrance",
    " limestone cliffs run along the coast for nearly twenty miles",
    " batteries should be charged before the long drive to the mountains",
    " librarians moved the maps to a room on the second floor",
    " concrete needs about four weeks to reach its full strength",
)


def controls(
    vector: SteeringVector,
    model: TransformerBridge | None = None,
    n_random: int = 20,
    unrelated: int | Sequence[str] = 8,
    seed: int = 0,
) -> dict[Control, SteeringVector]:
    """Matched controls of a vector, as conditions: they have its norm and should not steer.

    Args:
        vector: with its coefficient (``6 * v``), for the norms are taken from it.
        model: runs the unrelated texts; without it there are random directions only.
        n_random: how many random directions, with seeds from ``seed`` on.
        unrelated: how many of `UNRELATED`, or texts of your own.

    Returns:
        `Control` (its fields become columns of a table) -> vector.

    Raises:
        ValueError: more unrelated texts than there are.
    """
    found = {
        Control("random", str(s)): SteeringVector.random_like(vector, s)
        for s in range(seed, seed + n_random)
    }
    texts = UNRELATED[:unrelated] if isinstance(unrelated, int) else list(unrelated)
    if isinstance(unrelated, int) and len(texts) < unrelated:
        raise ValueError(f"There are {len(UNRELATED)} unrelated texts, {unrelated} are wanted.")
    for text in texts if model is not None else []:
        found[Control("unrelated", text)] = SteeringVector.unrelated_like(model, vector, text)
    return found
