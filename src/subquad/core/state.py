"""State: everything a model remembers, explicit, batch-first and serialisable."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from subquad.core.errors import CheckpointError, ConfigError

PRECISIONS = ("model", "high", "index")


def axes(names: str, *, shard: str | None = None, precision: str = "model", grows: str | None = None) -> Any:
    """Declare a state tensor.

    Args:
        names: its axes in order, separated by spaces; the first is always ``b``.
        shard: the axis that tensor parallelism splits, or None when every rank holds the whole tensor.
        precision: ``model`` follows the model's dtype, ``high`` is that but never below float32, ``index`` is
            an integer and never cast.
        grows: the axis that is as long as the capacity, filled from its beginning, or None.
    """
    assert names.split()[0] == "b"
    assert grows is None or grows in names.split()
    assert precision in PRECISIONS
    assert shard is None or shard in names.split()
    return dataclasses.field(metadata={"axes": names, "shard": shard, "precision": precision, "grows": grows})


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which recurrences accumulate: `dtype`, but at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _axis(declaration: dict[str, Any]) -> int:
    return declaration["axes"].split().index(declaration["grows"])


_KINDS: dict[str, type[State]] = {}


@dataclass(frozen=True)
class State:
    """Base of all states: a frozen dataclass of batch-first tensors, nested states and tuples of states.

    A subclass declares its tensors with `axes`; it is then a pytree, and every operation below works on it.
    ``schema`` is its version: raise it when the fields change, and give `migrate` the way from the old one.
    """

    schema: ClassVar[int] = 1

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _KINDS[f"{cls.__module__}.{cls.__qualname__}"] = cls
        # The dataclass decorator has not run yet, so the fields are read when a value is flattened.
        pytree.register_pytree_node(
            cls,
            lambda s: ([getattr(s, f.name) for f in dataclasses.fields(s)], None),
            lambda values, _: cls(*values),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def map(self, fn: Callable[[Tensor, dict[str, Any]], Tensor]) -> Self:
        """A state of ``fn(tensor, declaration)`` for each tensor, nested states included."""

        def visit(value: Any, declaration: dict[str, Any]) -> Any:
            if isinstance(value, Tensor):
                return fn(value, declaration)
            if isinstance(value, State):
                return value.map(fn)
            return tuple(visit(v, declaration) for v in value)

        return type(self)(**{f.name: visit(getattr(self, f.name), dict(f.metadata)) for f in dataclasses.fields(self)})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Dotted name and tensor of everything held."""

        def visit(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
            if isinstance(value, Tensor):
                yield name, value
            elif isinstance(value, State):
                for inner, tensor in value.tensors():
                    yield f"{name}.{inner}", tensor
            else:
                for i, v in enumerate(value):
                    yield from visit(v, f"{name}.{i}")

        for f in dataclasses.fields(self):
            yield from visit(getattr(self, f.name), f.name)

    @property
    def batch(self) -> int:
        """Number of rows; 0 for a state that holds nothing."""
        return next((t.shape[0] for _, t in self.tensors()), 0)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, capacity included."""
        return sum(t.numel() * t.element_size() for _, t in self.tensors())

    def select(self, rows: Tensor) -> Self:
        """The rows named by int64 `rows`, in that order, copied; a row may come twice."""
        return self.map(lambda t, _: t.index_select(0, rows))

    def fork(self, n: int) -> Self:
        """Every row `n` times in succession, so that each may go its own way."""
        return self.map(lambda t, _: t.repeat_interleave(n, dim=0))

    def row(self, i: int) -> Self:
        """Row `i` alone, sharing its memory."""
        return self.map(lambda t, _: t[i : i + 1])

    def snapshot(self) -> Self:
        """A detached copy that no later commit can change; its tensors lie in one buffer for each dtype.

        A copy of each would be a launch for each.
        """
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for _, t in self.tensors():
            kinds.setdefault(t.dtype, []).append(t.detach())
        copies = {
            dtype: iter(torch.cat([t.reshape(-1) for t in some]).split([t.numel() for t in some]))
            for dtype, some in kinds.items()
        }
        return self.map(lambda t, _: next(copies[t.dtype]).view(t.shape))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move, and cast what follows the model's dtype; integers stay, recurrent states stay at least float32."""

        def move(t: Tensor, declaration: dict[str, Any]) -> Tensor:
            wanted = dtype if t.is_floating_point() else None
            if wanted is not None and declaration["precision"] == "high":
                wanted = precise(wanted)
            return t.to(device=device, dtype=wanted)

        return self.map(move)

    def first(self, n: int) -> Self:
        """The first `n` rows, sharing their memory: what is written there is written here."""
        return self.map(lambda t, _: t[:n])

    def cut(self, tokens: int) -> Self:
        """A capacity of at most `tokens`, sharing memory: all that a state that has seen no more tokens holds."""

        def shorten(t: Tensor, declaration: dict[str, Any]) -> Tensor:
            axis = declaration["grows"]
            return t if axis is None else t.narrow(_axis(declaration), 0, min(tokens, t.shape[_axis(declaration)]))

        return self.map(shorten)

    def settled(self) -> Any:
        """The same value laid out as `Mixer.init_state` does; other than itself only for some of `Mixer.init_pool`."""

        def visit(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value
            return value.settled() if isinstance(value, State) else tuple(visit(v) for v in value)

        return type(self)(**{f.name: visit(getattr(self, f.name)) for f in dataclasses.fields(self)})

    def adopt(self, other: Any) -> Any:
        """`other`'s rows, settled or not, laid out as this pool's."""

        def visit(mine: Any, theirs: Any) -> Any:
            if isinstance(mine, Tensor):
                return theirs
            if isinstance(mine, State):
                return mine.adopt(theirs)
            return tuple(visit(m, t) for m, t in zip(mine, theirs, strict=True))

        names = [f.name for f in dataclasses.fields(self)]
        return type(other)(**{name: visit(getattr(self, name), getattr(other, name)) for name in names})

    def clear_(self, rows: Tensor) -> None:
        """Empty `rows` in place, as `Mixer.init_state` makes them."""
        for _, t in self.tensors():
            t.index_fill_(0, rows, 0)

    def write_(self, rows: Tensor | None, other: State) -> None:
        """Overwrite `rows` (all when None) with `other`'s, in place; its shapes must be this state's.

        Of a smaller capacity only the beginning is written, and what stands behind it stays.
        """
        other = self.adopt(other)
        declared: list[dict[str, Any]] = []

        def note(t: Tensor, declaration: dict[str, Any]) -> Tensor:
            declared.append(declaration)
            return t

        self.map(note)
        pairs: list[tuple[Tensor, Tensor]] = []
        for (name, mine), (_, theirs), declaration in zip(self.tensors(), other.tensors(), declared, strict=True):
            if declaration["grows"] is not None:
                axis = _axis(declaration)
                mine = mine.narrow(axis, 0, min(mine.shape[axis], theirs.shape[axis]))
            if mine.shape[1:] != theirs.shape[1:]:
                raise ConfigError(
                    f"state {name}: expected shape {tuple(mine.shape[1:])} a row, got {tuple(theirs.shape[1:])}; "
                    "use a state of the same capacity"
                )
            pairs.append((mine, theirs))
        for mine, theirs in pairs:
            if rows is None:
                mine.copy_(theirs.detach())
            else:
                mine.index_copy_(0, rows, theirs.detach().to(mine.dtype))

    @staticmethod
    def cat(states: list[Any]) -> Any:
        """The rows of all `states`, one after the other.

        Raises:
            ConfigError: no states, or states of several kinds or capacities.
        """
        if not states:
            raise ConfigError("expected states to concatenate, got none; give at least one")
        leaves, specs = zip(*(pytree.tree_flatten(s) for s in states), strict=True)
        if any(spec != specs[0] for spec in specs):
            raise ConfigError("expected states of one kind, got several; concatenate only states of the same model")
        for (name, _), parts in zip(states[0].tensors(), zip(*leaves, strict=True), strict=True):
            shapes = {tuple(part.shape[1:]) for part in parts}
            if len(shapes) > 1:
                raise ConfigError(
                    f"state {name}: expected one shape a row, got {sorted(shapes)}; use states of the same capacity"
                )
        return pytree.tree_unflatten([torch.cat(ts) for ts in zip(*leaves, strict=True)], specs[0])

    def _header(self) -> dict[str, Any]:
        def visit(value: Any) -> Any:
            if isinstance(value, Tensor):
                return None
            return value._header() if isinstance(value, State) else [visit(v) for v in value]

        return {
            "kind": f"{type(self).__module__}.{type(self).__qualname__}",
            "schema": self.schema,
            "fields": {f.name: visit(getattr(self, f.name)) for f in dataclasses.fields(self)},
        }

    def save(self, path: str | Path) -> None:
        """Write as safetensors, with kinds and schema versions in the header.

        Raises:
            CheckpointError: it could not be written.
        """
        tensors = {name: t.detach().contiguous().cpu() for name, t in self.tensors()}
        try:
            save_file(tensors, str(path), metadata={"subquad_state": json.dumps(self._header())})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: could not be written ({error}); free some space or choose another folder"
            ) from error

    @classmethod
    def migrate(cls, fields: dict[str, Any], schema: int) -> dict[str, Any]:
        """Bring `fields` of an older `schema` to this one; overridden where a schema has changed."""
        raise CheckpointError(
            f"{cls.__qualname__}: expected schema {cls.schema}, got {schema}, and there is no way between them; "
            "recompute the state from its tokens"
        )

    @staticmethod
    def load(path: str | Path, *, device: torch.device | str = "cpu") -> State:
        """Read what `save` wrote; the classes named in it must be imported.

        Raises:
            CheckpointError: no state there, a damaged one, an unknown kind, or a schema with no migration.
        """
        try:
            with safe_open(str(path), "pt") as f:
                header = (f.metadata() or {}).get("subquad_state")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: expected a saved state, got {error}; save it again") from error
        if header is None:
            raise CheckpointError(f"{path}: expected a saved state, got another safetensors file; write it with save()")
        tensors = load_file(str(path), device=str(device))

        def build(node: Any, name: str) -> Any:
            if node is None:
                return tensors[name]
            if isinstance(node, list):
                return tuple(build(v, f"{name}.{i}") for i, v in enumerate(node))
            kind = _KINDS.get(node["kind"])
            if kind is None:
                raise CheckpointError(f"{path}: unknown state {node['kind']!r}; import the module that defines it")
            prefix = f"{name}." if name else ""
            fields = {k: build(v, prefix + k) for k, v in node["fields"].items()}
            if node["schema"] != kind.schema:
                fields = kind.migrate(fields, node["schema"])
            return kind(**fields)

        return build(json.loads(header), "")
