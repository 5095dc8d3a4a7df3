import time

import pytest

from subquad.evals.code import passes

CHECK = "\ndef check(candidate):\n    assert candidate(1) == 2\n"


def ran(*bodies, check=CHECK, **limits):
    return passes([(body + check, "f") for body in bodies], **limits)


def test_tests_decide():
    right, wrong = "def f(x):\n    return x + 1\n", "def f(x):\n    return x\n"
    talks = "import collections, hashlib, math, re, typing\nprint('a' * 9000)\n" + right
    assert (
        ran(right, wrong, talks, "def f(", "g = 1", "def f(x):\n    raise SystemExit(0)\n")
        == [True, False, True] + [False] * 3
    )


@pytest.mark.parametrize("leave", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_leaving_early_passes_nothing(leave):
    assert ran(f"{leave}\ndef f(x):\n    return x + 1\n") == [False]


def test_time_is_limited_and_programs_run_at_once():
    began = time.monotonic()
    assert ran(*["def f(x):\n    while True: pass\n"] * 3, seconds=1.0, workers=3) == [False] * 3
    assert time.monotonic() - began < 2.8


@pytest.mark.parametrize(
    "body",
    [
        "return 2 if len(bytearray(600 << 20)) else 0",
        "import socket; socket.socket(); return 2",
        "open('a', 'w').write('b'); return 2",
        "import subprocess; subprocess.run(['true']); return 2",
        "import os; os.fork(); return 2",
        "import os; os.remove('a'); return 2",
        "import ctypes; return 2 if ctypes.CDLL(None) else 0",
    ],
)
def test_what_no_function_needs_is_refused(body):
    assert ran(f"def f(x):\n    {body}\n", memory=2**29) == [False]
    # Catching the refusal is no way around: the function still has nothing to return but what is right.
    assert ran(f"def f(x):\n    try:\n        {body}\n    except BaseException:\n        return 3\n", memory=2**29) == [
        False
    ]


def test_the_environment_is_empty_and_the_folder_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    body = "import os\ndef f(x):\n    return 2 if 'SECRET' not in os.environ and not os.listdir() else 0\n"
    assert ran(body) == [True]
