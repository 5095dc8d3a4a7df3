"""The inside of a process that runs one program from its input; `subquad.evals.code` starts it."""

import contextlib
import os
import sys

REFUSED = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.kill",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.chown",
    "os.truncate",
    "shutil.",
    "ctypes.",
    "resource.",
    "pty.",
    "webbrowser.",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


def guard(event: str, args: tuple[object, ...]) -> None:
    """Refuse what no test of a function needs."""
    if event.startswith(REFUSED):
        raise PermissionError(event)
    if event == "open" and isinstance(args[2], int) and args[2] & WRITING:
        raise PermissionError("open for writing")


def fence(seconds: int, memory: int) -> None:
    """Limits that hold until the process ends."""
    if hasattr(os, "unshare"):
        with contextlib.suppress(OSError):  # where the kernel forbids it, the hook still refuses sockets
            os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET)  # pyright: ignore
    try:
        import resource
    except ImportError:
        pass  # no such limits on this system: the parent still watches the clock
    else:
        for what, limit in (
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_FSIZE, 0),
            (resource.RLIMIT_NOFILE, 16),
            (resource.RLIMIT_NPROC, 0),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(what, (limit, limit))
    sys.addaudithook(guard)


def main() -> None:
    """Run the program, check its function, and say so."""
    token, entry, seconds, memory = sys.argv[1:]
    del sys.argv[1:]
    source, out = sys.stdin.read(), os.dup(1)
    # What the program prints goes nowhere.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    fence(int(seconds), int(memory))
    names: dict[str, object] = {"__name__": "candidate"}
    exec(compile(source, "candidate.py", "exec"), names)
    names["check"](names[entry])  # pyright: ignore
    os.write(out, token.encode())
    # Nothing of the program runs after its verdict.
    os._exit(0)


if __name__ == "__main__":
    main()
