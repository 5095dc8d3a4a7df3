"""What training changed: the difference of a converted student to its teacher, in one small portable file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import subquad
from subquad.core.config import config_from_dict, config_to_dict
from subquad.core.errors import CheckpointError, ConfigError, UnsupportedError
from subquad.models.checkpoint import config_json, config_of
from subquad.models.counterpart import Base, began, distance
from subquad.models.stack import Stack
from subquad.models.teachers import LoadedModel
from subquad.models.weights import build

KEY = "subquad.difference"
SCHEMA = 1
SAMPLES = 256
# Tensors of so few elements, norms and decays among them, are stored as they are: they cost next to nothing.
FEW = 2**14
OVERSAMPLING, POWERS = 8, 4
LEFT, RIGHT = ".left", ".right"
REMEDY = "fetch or write the file again"


@dataclass(frozen=True)
class Entry:
    """One tensor of the student: how it is put together again.

    Attributes:
        group: kind of tensor, for reports.
        shape, dtype: as in the student.
        form: ``same`` as the base; ``zeros``; a ``value`` whole; the ``difference`` to the base; or its ``factors``,
            left and right, of a low-rank difference.
        base: where it began in the teacher, or None.
        nbytes: of what is stored.
        error: ``|rebuilt - student| / |student|``.
        lost: ``|rebuilt - student| / |student - base|``, the share of what training changed that is not kept.
    """

    group: str
    shape: Sequence[int]
    dtype: str
    form: str
    base: Base | None
    nbytes: int
    error: float
    lost: float


@dataclass(frozen=True)
class Origin:
    """The teacher: its `LoadedModel.name`, ``spec`` and ``license``, and its `digest`."""

    name: str
    spec: str
    license: str | None
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What the head of the file says.

    Attributes:
        name, license: of the student.
        teacher: what it is the difference to.
        config: the student's config.json.
        dtype, rank: as asked for.
        entries: by name of the student's tensors.
        recipe: settings of the conversion.
        card: the student's README.
        version: of the library that wrote it.
    """

    name: str
    license: str | None
    teacher: Origin
    config: Mapping[str, Any]
    dtype: str
    rank: int
    entries: Mapping[str, Entry]
    recipe: Mapping[str, Any]
    card: str
    version: str

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def student_nbytes(self) -> int:
        """Bytes of the student's tensors."""
        entries = self.entries.values()
        return sum(torch.Size(e.shape).numel() * _dtype(e.dtype).itemsize for e in entries)


def digest(model: Stack) -> str:
    """SHA-256 over name, shape, a checksum and `SAMPLES` or so values of every tensor: fast, and enough to know one.

    The step between the values is odd, so that they don't all stand in one column. Values count as float32, so that a
    model read in a wider type than it was saved in is the same. The config has no part in it: the student's is in the
    file, whole.
    """
    sha = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        sample_n = x.flatten()[:: x.numel() // SAMPLES | 1].float().cpu().contiguous()
        # A sum of integers has no order: floats of one value have one bit pattern, on any device and in any dtype.
        bits = int(x.float().contiguous().view(torch.int32).long().sum())
        sha.update(f"{name} {tuple(x.shape)} {bits}\n".encode())
        sha.update(sample_n.numpy().tobytes())
    return sha.hexdigest()


# -- writing ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def write_difference(
    student: LoadedModel,
    teacher: LoadedModel,
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    rank: int = 0,
    recipe: Mapping[str, Any] | None = None,
    card: str = "",
) -> Manifest:
    """Write what `student` has and `teacher` has not.

    A tensor of a new mixer is compared with the heads of the attention that stood there, any other with the teacher's
    of its name. What is equal bit for bit takes no room. Of value and difference that one is stored which `dtype` keeps
    more exactly; norms, biases and decays are stored as they are. A tied head is stored once.

    Args:
        student: a model whose layers the teacher's were before some were converted.
        teacher: the model it started from, in the dtype that `load_model` gives it.
        path: of the file, replaced whole or not at all.
        dtype: of what is stored.
        rank: store differences outside the new mixers as two factors of this rank, where these are smaller; 0 never.
        recipe: settings of the conversion, for the manifest.
        card: the student's README, for the manifest.

    Raises:
        ConfigError: the two don't belong together, or `rank` is negative.
        CheckpointError: the file could not be written.
    """
    ours, theirs = student.model.config, teacher.model.config
    for field in ("vocab_size", "d_model", "d_mlp"):
        if getattr(ours, field) != getattr(theirs, field):
            raise ConfigError(
                f"{student.name}: expected the {field} of {teacher.name}, {getattr(theirs, field)}, got "
                f"{getattr(ours, field)}; give the model whose layers were converted"
            )
    if len(ours.layers) != len(theirs.layers):
        raise ConfigError(
            f"{student.name}: expected the {len(theirs.layers)} layers of {teacher.name}, got {len(ours.layers)}; "
            "give the model whose layers were converted"
        )
    if rank < 0:
        raise ConfigError(f"rank={rank}: expected 0 or more; 0 stores differences whole")
    new = {
        i for i, pair in enumerate(zip(ours.layers, theirs.layers, strict=True)) if _plain(pair[0]) != _plain(pair[1])
    }
    source, entries, stored = teacher.model.state_dict(), dict[str, Entry](), dict[str, Tensor]()
    weights = student.model.state_dict()
    if ours.tied:
        del weights["lm_head.weight"]
    for name, value in weights.items():
        part = name.split(".")
        if name.startswith("blocks.") and part[2] == "mixer" and int(part[1]) in new:
            group = f"new {ours.layers[int(part[1])]['mixer']}"
            base, most = began(value, teacher.model, int(part[1])), 0
        else:
            group, most = _group(name), rank
            same = source.get(name)
            base = Base(name) if same is not None and same.shape == value.shape else None
        entry, tensors = _pack(group, value, base, source, dtype, most)
        entries[name] = entry
        stored |= {name + suffix: x.cpu() for suffix, x in tensors.items()}
    manifest = Manifest(
        name=student.name,
        license=student.license or teacher.license,
        teacher=Origin(teacher.name, teacher.spec, teacher.license, digest(teacher.model)),
        config=config_json(ours),
        dtype=_name(dtype),
        rank=rank,
        entries=entries,
        recipe=recipe or {},
        card=card,
        version=subquad.__version__,
    )
    _save(stored, manifest, Path(path).expanduser())
    return manifest


def _pack(
    group: str, value: Tensor, base: Base | None, source: Mapping[str, Tensor], dtype: torch.dtype, rank: int
) -> tuple[Entry, dict[str, Tensor]]:
    """The entry of a tensor and what is stored of it, by suffix of its name."""
    start = None if base is None else base.of(source).to(value.device)

    def packed(form: str, tensors: dict[str, Tensor]) -> tuple[Entry, dict[str, Tensor]]:
        nbytes = sum(x.numel() * x.itemsize for x in tensors.values())
        entry = Entry(group, tuple(value.shape), _name(value.dtype), form, base, nbytes, 0.0, 0.0)
        off, size, change = distance(rebuilt(entry, tensors, start), value), distance(value), distance(value, start)
        return dataclasses.replace(entry, error=off / (size or 1), lost=off / (change or 1)), tensors

    if start is not None and torch.equal(start.to(value.dtype), value):
        return packed("same", {})
    if not value.any():
        return packed("zeros", {})
    if value.numel() <= FEW or not value.is_floating_point():
        return packed("value", {"": value.contiguous()})
    choices = [packed("value", {"": value.to(dtype).contiguous()})]
    if start is not None:
        wide = torch.promote_types(value.dtype, torch.float32)  # as in `rebuilt`
        difference = value.to(wide) - start.to(wide)
        if rank and value.dim() == 2 and rank * sum(value.shape) < value.numel():
            left, right = _factors(difference, rank, dtype)
            return packed("factors", {LEFT: left, RIGHT: right})
        choices.append(packed("difference", {"": difference.to(dtype).contiguous()}))
    return min(choices, key=lambda choice: choice[0].error)


def _factors(x_mn: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``[m, rank]`` and ``[rank, n]``, whose product is nearest to `x_mn` (randomised, arXiv 0909.4061)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same file every time
        left_mr, size_r, right_nr = torch.svd_lowrank(x_mn, min(rank + OVERSAMPLING, *x_mn.shape), niter=POWERS)
    root_r = size_r[:rank].sqrt()
    return (left_mr[:, :rank] * root_r).to(dtype), (right_nr[:, :rank] * root_r).T.to(dtype).contiguous()


def _group(name: str) -> str:
    for part, group in ((".mixer.", "kept mixers"), (".mlp.", "MLPs"), ("norm", "norms")):
        if part in name:
            return group
    return "embedding and head"


def _plain(layer: Mapping[str, Any]) -> Any:
    """As JSON has it, where tuples are lists."""
    return json.loads(json.dumps(dict(layer)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype: Any = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"expected a dtype of torch, got {name!r}; fetch or write the difference again")
    return dtype


def _save(tensors: dict[str, Tensor], manifest: Manifest, path: Path) -> None:
    fresh = path.with_name(f".{path.name}.saving")
    # One key only, for safetensors writes several in an order that changes from file to file.
    head = {KEY: json.dumps({"schema": SCHEMA} | config_to_dict(manifest))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.touch()
        mode = fresh.stat().st_mode
        save_file(tensors, str(fresh), metadata=head)
        fresh.chmod(mode)  # safetensors lets nobody but the owner read; others may read as far as they may any file
        os.replace(fresh, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: could not be written ({error}); free some space or choose another place"
        ) from error
    finally:
        fresh.unlink(missing_ok=True)


# -- reading ----------------------------------------------------------------------------------------------------------


def read_manifest(path: str | Path) -> Manifest:
    """The head of a file that `write_difference` wrote.

    Raises:
        CheckpointError: nothing there, another kind of file, damaged, or of another schema.
    """
    return _read(Path(path).expanduser(), tensors=False)[0]


def apply_difference(path: str | Path, teacher: LoadedModel) -> LoadedModel:
    """The student of which `path` holds the difference, with the teacher's tokenizer.

    Tensors that training has not changed are the teacher's own, so that the two may be used together but not trained.

    Args:
        path: a file that `write_difference` wrote.
        teacher: the model that it was taken from.

    Raises:
        CheckpointError: a file that is missing, damaged or of another kind, or another teacher.
    """
    file = Path(path).expanduser()
    manifest, stored = _read(file, tensors=True)
    expected, got = manifest.teacher, digest(teacher.model)
    if got != expected.digest:
        raise CheckpointError(
            f"{file}: expected the teacher {expected.name} ({expected.spec}, digest {expected.digest[:12]}), got "
            f"{teacher.name} (digest {got[:12]}); give the very model that the difference was taken from"
        )
    source, weights = teacher.model.state_dict(), dict[str, Tensor]()
    for name, entry in manifest.entries.items():
        if entry.base is not None and entry.base.name not in source:
            raise CheckpointError(f"{file}: {name}: expected {entry.base.name} in the teacher, got none; {REMEDY}")
        tensors: dict[str, Tensor] = {}
        for suffix, shape in _shapes(entry, manifest.rank).items():
            x = stored.get(name + suffix)
            if x is None or tuple(x.shape) != tuple(shape):
                got = "none" if x is None else tuple(x.shape)
                raise CheckpointError(f"{file}: {name + suffix}: expected shape {tuple(shape)}, got {got}; {REMEDY}")
            tensors[suffix] = x.to(teacher.model.device)
        weights[name] = rebuilt(entry, tensors, None if entry.base is None else entry.base.of(source))
        weights[name] = weights[name].to(teacher.model.device)
    model = build(config_of(dict(manifest.config), where=f"{file}: config"), weights, where=str(file))
    return LoadedModel(model, teacher.tokenizer, manifest.name, str(path), manifest.license)


@torch.no_grad()
def rebuilt(entry: Entry, stored: Mapping[str, Tensor], base: Tensor | None) -> Tensor:
    """A tensor of the student.

    Args:
        entry: its own.
        stored: what the file holds of it, by suffix of its name.
        base: of the entry, from the teacher.

    Raises:
        UnsupportedError: a form that this version does not know.
    """
    dtype = _dtype(entry.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    if entry.form == "value":
        return stored[""].to(dtype)
    if entry.form == "zeros":
        return torch.zeros(tuple(entry.shape), dtype=dtype)
    if base is not None and entry.form == "same":
        return base.to(dtype)
    if base is not None and entry.form == "difference":
        return (base.to(wide) + stored[""].to(wide)).to(dtype)
    if base is not None and entry.form == "factors":
        return (base.to(wide) + stored[LEFT].to(wide) @ stored[RIGHT].to(wide)).to(dtype)
    raise UnsupportedError(f"form {entry.form!r} of a difference; install the version of subquad that wrote it")


def _shapes(entry: Entry, rank: int) -> dict[str, Sequence[int]]:
    """What the file must hold of a tensor, by suffix of its name."""
    if entry.form in ("same", "zeros"):
        return {}
    if entry.form == "factors":
        m, n = entry.shape
        return {LEFT: (m, rank), RIGHT: (rank, n)}
    return {"": entry.shape}


def _read(path: Path, *, tensors: bool) -> tuple[Manifest, dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file, got nothing there; check the path")
    try:
        with safe_open(str(path), "pt") as file:
            head: Mapping[str, str] = file.metadata() or {}
            names: list[str] = file.keys() if tensors else []
            stored = {name: file.get_tensor(name) for name in names}
        values: dict[str, Any] = json.loads(head.get(KEY, "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: could not be read ({error}); fetch or write it again") from error
    if values.get("schema") != SCHEMA:
        known = f"expected schema {SCHEMA}, got {values.get('schema')!r}; install the version of subquad that wrote it"
        other = "expected a file that `subquad diff` wrote, got other tensors; check the path"
        raise CheckpointError(f"{path}: {known if values else other}")
    del values["schema"]
    entries: dict[str, Entry] = {}
    for name, entry in values.get("entries", {}).items():
        base = entry.get("base")
        begun = None if base is None else config_from_dict(Base, base, where=f"{path}: {name}")
        entries[name] = config_from_dict(Entry, entry | {"base": begun}, where=f"{path}: {name}")
    teacher = config_from_dict(Origin, values.get("teacher", {}), where=f"{path}: teacher")
    return config_from_dict(Manifest, values | {"entries": entries, "teacher": teacher}, where=str(path)), stored
