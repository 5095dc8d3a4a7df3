"""Finds the bench rooms, and runs one."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from subquad.bench.harness import Bench, GateError
from subquad.bench.results import Result, dtype_name, environment
from subquad.core.errors import ConfigError, nearest

HERE = Path(__file__).resolve().parent


def rooms() -> list[str]:
    """``family/slug`` of every bench room there is, sorted."""
    found: list[str] = []
    for folder in HERE.iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            for room in folder.iterdir():
                if (room.suffix == ".py" and room.stem != "__init__") or (room / "__init__.py").exists():
                    found.append(f"{folder.name}/{room.stem}")
    return sorted(found)


def find_rooms(names: list[str]) -> list[str]:
    """The rooms that `names` mean: a ``family/slug``, or a family for all of its own; every room for an empty list.

    Raises:
        ConfigError: no such room, with the nearest name.
    """
    known = rooms()
    families = {room.split("/")[0] for room in known}
    chosen: list[str] = []
    for name in names or sorted(families):
        if name in known:
            chosen.append(name)
        elif name in families:
            chosen.extend(room for room in known if room.startswith(f"{name}/"))
        else:
            raise ConfigError(f"unknown bench {name!r}{nearest(name, [*known, *families])}")
    return list(dict.fromkeys(chosen))


def missing(room: str) -> tuple[str, str] | None:
    """A package that a room's ``NEEDS`` names and that is not installed, and what brings it; None where none lacks."""
    module = importlib.import_module(f"subquad.bench.{room.replace('/', '.')}")
    needs: Mapping[str, str] = getattr(module, "NEEDS", {})
    return next((each for each in needs.items() if importlib.util.find_spec(each[0]) is None), None)


def run_room(
    room: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    smoke: bool = False,
    say: Callable[[str], None] = lambda line: None,
    hybrid: str = "",
    hybrid_rows: int = 0,
    drafter: Path | None = None,
    data: Path | None = None,
    minutes: float = 0.0,
    work: Path | None = None,
    threads: int = 0,
    unfinished: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Run one bench room and return its result.

    Args:
        room: ``family/slug``.
        device: where to measure.
        dtype: the dtype to measure in.
        smoke: tiny sizes, one repetition.
        say: told one line about each step, where the room has something to say.
        hybrid, hybrid_rows, drafter, data, minutes, work: see `Bench`.
        threads: of PyTorch on the CPU; 0 leaves them.
        unfinished: given the figures so far where the room is broken off, if there are any; not where a gate is red.

    Raises:
        GateError: what was to be timed computes something else than it should.
        ConfigError: a package is missing.
    """
    if threads:
        torch.set_num_threads(threads)
    device = torch.device(device)
    bench = Bench(
        room.replace("/", "."),
        device=device,
        dtype=dtype,
        smoke=smoke,
        say=say,
        hybrid=hybrid,
        hybrid_rows=hybrid_rows,
        drafter=drafter,
        data=data,
        minutes=minutes,
        work=work,
    )
    module = importlib.import_module(f"subquad.bench.{bench.name}")
    if (needed := missing(room)) is not None:
        raise ConfigError(f"bench {room}: expected the package {needed[0]}, got none; pip install {needed[1]}")
    torch.manual_seed(0)
    command = f"subquad bench {room} --device {device.type} --dtype {dtype_name(dtype)}" + (" --smoke" if smoke else "")
    # Where they lie is this machine's own affair.
    command += f" --hybrid {Path(hybrid).name}" if hybrid else ""
    command += f" --hybrid-rows {hybrid_rows}" if hybrid_rows else ""
    command += f" --drafter {drafter.name}" if drafter is not None else ""
    command += f" --data {data.name}" if data is not None else ""
    command += f" --minutes {minutes:g}" if minutes else ""
    command += f" --threads {threads}" if threads else ""

    def result() -> Result:
        env = environment(device, dtype) | ({"limits": bench.limits} if bench.limits else {})
        return Result(bench.name, command, env, bench.rows, bench.gates)

    try:
        module.run(bench)
    except GateError:
        raise
    except BaseException:
        if bench.rows:
            unfinished(result())
        raise
    return result()
