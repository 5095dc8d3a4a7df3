"""What the benches of recurrences over a sequence share: gates against the equation, a sweep over lengths, limits."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from subquad.bench.harness import Bench, GateError
from subquad.bench.timing import Call, compiled
from subquad.core.errors import UnsupportedError
from subquad.ops import backends, chunks, launch

# The equation's loop is run with gradients at this length, which no chunk divides.
LOOP = 333
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
# The length at which a library that tunes itself meets our shapes first.
TUNED_AT = 32768
# Lengths that nothing divides: a kernel that was compiled for one of them alone would show.
ODD = (1, 63, 777, 1000, 4097)
FLA = "flash-linear-attention"
# Two computations of one function in bfloat16 are nearer than this.
SAME = 0.05
SDPA = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}

Arguments = tuple[Tensor, ...]


@dataclass(frozen=True)
class Scan:
    """A recurrence and what it must at least do.

    The expressions are in the sizes b, t, h, k, v and e, the bytes of an element; they stand in the rows as they are.

    Attributes:
        op: its package, ``subquad.ops.<op>``.
        names: of its arguments, in order; the last is the state.
        draw: random arguments for sizes b, t, h, k, v.
        moved: bytes of a forward: each argument read once, each result written once.
        flops: of a forward: the state's update and its reading, in any form that is linear in t.
        train_moved: bytes of forward and backward: the backward reads the arguments and dy, and writes the gradients.
        train_flops: of forward and backward.
    """

    op: ModuleType
    names: tuple[str, ...]
    draw: Callable[..., Arguments]
    moved: str
    flops: str
    train_moved: str
    train_flops: str

    @property
    def name(self) -> str:
        """Of the operation."""
        return self.op.__name__.rpartition(".")[2]

    def has(self, backend: str) -> bool:
        """Whether there is an implementation of that name."""
        return importlib.util.find_spec(f"{self.op.__name__}.on_{backend}") is not None

    def on(self, backend: str) -> Call:
        """Its `scan` on one implementation."""

        def scan(*arguments: Tensor) -> tuple[Tensor, Tensor]:
            with backends.use(backend):
                return self.op.scan(*arguments)

        return scan


def run_scan(bench: Bench, scan: Scan) -> None:
    """First call, lengths without another compilation, gates, then forward and forward with backward over lengths."""
    cuda = bench.device.type == "cuda"
    ours = scan.on("triton" if cuda and scan.has("triton") else "torch")
    b, h, k, v = bench.size((1, 16, 128, 128), smoke=(1, 2, 16, 16))
    lengths = bench.size(LENGTHS if cuda else LENGTHS[:1], smoke=(70,))
    sizes = {"b": b, "h": h, "k": k, "v": v, "e": torch.empty(0, dtype=bench.dtype).element_size()}

    def draw(t: int, b: int = b, h: int = h) -> Arguments:
        return scan.draw(bench, b, t, h, k, v)

    _first_calls(bench, ours, draw, lengths, sizes)
    rtol = _prove(bench, scan, ours, draw(bench.size(LOOP, smoke=70), b=2))
    fla, why = _library(bench, scan, draw(min(TUNED_AT, max(lengths))))
    softmax = _softmaxes(bench, draw(64))
    for t in lengths:
        arguments = draw(t)
        shape = {**sizes, "t": t}
        _prove(bench, scan, ours, arguments, rtol=rtol)
        _forward(bench, scan, {"ours": ours} | fla | softmax, arguments, shape, why)
        _training(bench, scan, ours, softmax, arguments, shape)


def _forward(
    bench: Bench, scan: Scan, contenders: dict[str, Call], arguments: Arguments, shape: dict[str, Any], why: str
) -> None:
    moved, flops = count(scan.moved, shape), count(scan.flops, shape)
    with torch.no_grad():
        times = bench.race(contenders, bench.copies(arguments))
    t, fla = shape["t"], FLA if FLA in contenders else ""
    note = {"tuned_at": TUNED_AT} if fla and bench.device.type == "cuda" else {"no_baseline": why} if why else {}
    shape = _told(scan.moved, scan.flops, shape)
    bench.speed(f"fwd.t{t}", times, baseline=fla, moved=moved, flops=flops, shape=shape | note)
    best, kernel = _best(times.median, contenders)
    bench.speed(
        f"fwd_sdpa.t{t}",
        times,
        baseline=best,
        baseline_name="causal SDPA",
        moved=moved,
        flops=flops,
        shape=shape | {"sdpa": kernel},
    )


def _training(
    bench: Bench, scan: Scan, ours: Call, softmax: dict[str, Call], arguments: Arguments, shape: dict[str, Any]
) -> None:
    t, moved, flops = shape["t"], count(scan.train_moved, shape), count(scan.train_flops, shape)
    dy_bthv = torch.randn_like(arguments[2])
    # The state before the first token is a constant in training.
    leaves = (*(x.requires_grad_() for x in arguments[:-1]), arguments[-1])
    copies = bench.copies((*leaves, dy_bthv))
    times = bench.race({name: trained(fn) for name, fn in ({"ours": ours} | softmax).items()}, copies)
    best, kernel = _best(times.median, softmax)
    shape = _told(scan.train_moved, scan.train_flops, shape)
    bench.speed(
        f"fwdbwd.t{t}",
        times,
        baseline=best,
        baseline_name="causal SDPA",
        moved=moved,
        flops=flops,
        shape=shape | {"sdpa": kernel},
    )
    if t == bench.size(8192, smoke=70):
        name = "PyTorch's chunked form"
        times = bench.race({"ours": trained(ours), name: trained(scan.on("torch"))}, copies)
        bench.speed(f"fwdbwd_torch.t{t}", times, baseline=name, moved=moved, flops=flops, shape=shape)


def trained(fn: Call) -> Call:
    """`fn` with its backward: called with its arguments and dy, it returns the gradients of those that learn."""

    def step(*arguments: Tensor) -> tuple[Tensor, ...]:
        *given, dy = arguments
        leaves = [x for x in given if x.requires_grad]
        made: Any = fn(*given)
        y = made[0] if isinstance(made, tuple) else made
        return torch.autograd.grad(y, leaves, dy, allow_unused=True)

    return step


def _first_calls(
    bench: Bench, ours: Call, draw: Callable[..., Arguments], lengths: tuple[int, ...], sizes: dict[str, Any]
) -> None:
    """What the first call costs, and that other lengths, batches and heads cost nothing of the kind."""

    def call(t: int, **other: int) -> None:
        arguments = draw(t, **other)
        with torch.no_grad():
            ours(*arguments)
        trained(ours)(*(x.requires_grad_() for x in arguments[:-1]), arguments[-1], torch.randn_like(arguments[2]))
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)

    def compilations(work: Callable[[], object], fresh: bool = False) -> int:
        with compiled(fresh=fresh) as names:
            work()
        own = [name for name in names if name.startswith("subquad.")]
        bench.say(f"{bench.name}: compiled {', '.join(own) or 'nothing'}")
        return len(own)

    # What any first product on a device costs is not ours.
    x = torch.ones(64, 64, **bench.factory, requires_grad=True)
    torch.autograd.grad((x @ x).sum(), x)
    began = time.perf_counter()
    n = compilations(lambda: call(lengths[0]), fresh=True)
    shape = {**sizes, "t": lengths[0], "kernels": n, "what": "a forward alone, then a forward with its backward"}
    bench.value("first_call", time.perf_counter() - began, "s", "lower", shape=shape)
    others = (*lengths[1:], *bench.size(ODD, smoke=(1, 37)))
    n = compilations(lambda: [call(t) for t in others])
    bench.value("recompiles", n, "1", "lower", shape={**sizes, "t": list(others)})
    batches = bench.size(((1000, 3, 16), (777, 2, 3), (64, 1, 1)), smoke=((9, 2, 1),))
    n = compilations(lambda: [call(t, b=b, h=h) for t, b, h in batches])
    bench.value("recompiles.shapes", n, "1", "lower", shape={"t_b_h": [list(x) for x in batches]})


def _prove(
    bench: Bench, scan: Scan, ours: Call, arguments: Arguments, *, rtol: dict[str, dict[str, float]] | None = None
) -> dict[str, dict[str, float]]:
    """Gate outputs, final state and every gradient, with NaN in all scratch memory.

    Without `rtol` the truth is the equation in float64. With `rtol`, what that allowed, it is the PyTorch form in
    float64, for lengths at which the equation's loop would take hours.
    """
    t = arguments[0].shape[1]
    dy, dstate = torch.randn_like(arguments[2]), torch.randn_like(arguments[-1])
    got = _results(scan, ours, arguments, dy, dstate, poison=True)
    truth = scan.op.equation if rtol is None else scan.on("torch")
    want = _exact(scan, truth, arguments, dy, dstate)
    naive: dict[str, Tensor] = {}
    if rtol is None and rounding(bench) is None:
        naive = _results(scan, partial(scan.op.equation, dtype=bench.dtype), arguments, dy, dstate)
    allowed: dict[str, dict[str, float]] = {}
    red: list[str] = []
    # In float32 rounding adds up with the length, as a random walk does; what bfloat16 allows has room for that.
    grown = max(1.0, (t / LOOP) ** 0.5) if rounding(bench) else 1.0
    for name, x in got.items():
        what = f"{name} at t={t} equals {'the equation' if rtol is None else 'the PyTorch form in float64'}"
        bound: dict[str, Any] = {"naive": naive[name]} if naive else {"rtol": rounding(bench)}
        if rtol is not None:
            bound = {"rtol": {measure: grown * error for measure, error in rtol[name].items()}}
        try:
            allowed[name] = bench.gate(what, x, want[name], **bound)
        except GateError as error:
            red.append(str(error))
    if red:
        raise GateError("\n".join(red))
    worst = max(bench.gates[-len(got) :], key=lambda gate: gate["error"] / gate["limit"])
    bench.say(f"{bench.name}: {len(got)} gates at t={t}, nearest its limit {worst['what']}: {worst['error']:.1e}")
    return allowed


def rounding(bench: Bench) -> float | None:
    """The error allowed in float32; None in half precision, where it is twice that of the equation in that dtype.

    In float32 a chunk's sums of 64 terms in another order differ by 8 epsilons, as a random walk does, and two such
    products stand behind each result.
    """
    dtype = torch.finfo(bench.dtype)
    return None if dtype.bits < 32 else 2 * chunks.CHUNK**0.5 * dtype.eps


def _results(
    scan: Scan, fn: Call, arguments: Arguments, dy: Tensor, dstate: Tensor, *, poison: bool = False
) -> dict[str, Tensor]:
    """Outputs, final state and all gradients by name."""
    leaves = [x.detach().clone().requires_grad_() for x in arguments]
    with poisoned() if poison else nullcontext():
        made: Any = fn(*leaves)
        y, state = made
        gradients = torch.autograd.grad((y, state), leaves, (dy.to(y.dtype), dstate.to(state.dtype)))
    named = {f"d{name}": d for name, d in zip(scan.names, gradients, strict=True)}
    return {"y": y.detach(), "final state": state.detach()} | named


def _exact(scan: Scan, truth: Call, arguments: Arguments, dy: Tensor, dstate: Tensor) -> dict[str, Tensor]:
    """`_results` in float64, four heads at a time so that long sequences fit in memory."""
    parts: list[dict[str, Tensor]] = []
    for i in range(0, dy.shape[2], 4):
        given = [x[:, :, i : i + 4].double() for x in (*arguments[:-1], dy)]
        first, last = (x[:, i : i + 4].double() for x in (arguments[-1], dstate))
        parts.append(_results(scan, truth, (*given[:-1], first), given[-1], last))
    return {name: torch.cat([part[name] for part in parts], dim=1 if "state" in name else 2) for name in parts[0]}


@contextmanager
def poisoned() -> Generator[None]:
    """Scratch memory holds NaN inside the block, so that what no kernel wrote shows."""
    launch.poison = True
    try:
        yield
    finally:
        launch.poison = False


def _library(bench: Bench, scan: Scan, arguments: Arguments) -> tuple[dict[str, Call], str]:
    """flash-linear-attention, tuned by its first call; or why there is none."""
    if not scan.has("fla"):
        return {}, "flash-linear-attention is not wired up for this operation"
    if importlib.util.find_spec("fla") is None:
        return {}, "flash-linear-attention is not installed"
    theirs: Any = scan.on("fla")
    began = time.perf_counter()
    try:
        with torch.no_grad():
            got = theirs(*arguments)[0].float()
            bench.say(f"{bench.name}: flash-linear-attention's first call took {time.perf_counter() - began:.1f} s")
            want = scan.op.scan(*arguments)[0].float()
    except UnsupportedError as error:
        return {}, str(error)
    except Exception as error:
        # A library's own trouble takes only its own figures away.
        return {}, f"flash-linear-attention failed: {type(error).__name__}: {str(error)[:200]}"
    apart = float((got - want).norm() / want.norm())
    if not apart <= SAME:
        return {}, f"flash-linear-attention's outputs differ by {apart:.1%}"
    return {FLA: theirs}, ""


def _softmaxes(bench: Bench, arguments: Arguments) -> dict[str, Call]:
    """Causal softmax attention by every kernel of PyTorch's that runs here; the fastest of them is the baseline."""

    def causal(kernel: SDPBackend | None, *given: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in given[:3])
        with nullcontext() if kernel is None else sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    if bench.device.type != "cuda":
        return {"causal": partial(causal, None)}
    found: dict[str, Call] = {}
    for name, kernel in SDPA.items():
        try:
            causal(kernel, *arguments)
        except RuntimeError:
            continue
        found[name] = partial(causal, kernel)
    return found or {"causal": partial(causal, None)}


def _best(median: Callable[[str], float], contenders: dict[str, Call]) -> tuple[str, str]:
    """The fastest softmax attention among the contenders, and what to call its kernel."""
    name = min((n for n in contenders if n in (*SDPA, "causal")), key=median)
    return name, "PyTorch's choice" if name == "causal" else name


def _told(moved: str, flops: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """What a reader needs to work out the limit again."""
    told = {"moved": f"{moved} = {count(moved, sizes):.0f} bytes", "flops": f"{flops} = {count(flops, sizes):.0f}"}
    return {**sizes, **told}


def count(expression: str, sizes: dict[str, Any]) -> float:
    """An arithmetic expression in sizes by name."""
    return float(eval(expression, {"__builtins__": {}}, dict(sizes)))


def decays(bench: Bench, *shape: int) -> Tensor:
    """Log decays in float32 whose half-lives range over a thousandfold from head to head, the third axis."""
    rates = torch.logspace(-3, 0, shape[2], device=bench.device).reshape(-1, *(1,) * (len(shape) - 3))
    return -rates * F.softplus(torch.randn(*shape, device=bench.device))
