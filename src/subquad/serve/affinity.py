"""Which of several replicas a request should go to: the one that has read its beginning before, unless it is busy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

BEGINNING = 256
"""Characters or tokens of a prompt that decide: about the least that a prefix cache keeps, or a few times that."""


def beginning(path: str, body: bytes) -> str | None:
    """What requests have in common whose prompts begin alike; None where there is nothing to share.

    Of a chat the messages up to the first of a user count, since later turns repeat them; what follows does not.

    Args:
        path: of the request.
        body: JSON, whose size and depth were checked; what is wrong in it is for a replica to tell.
    """
    if path not in ("/v1/chat/completions", "/v1/completions"):
        return None
    try:
        asked = json.loads(body)
    except ValueError:
        return None
    if not isinstance(asked, dict):
        return None
    fields = cast("dict[str, Any]", asked)
    text = _messages(fields.get("messages")) if "messages" in fields else _prompt(fields.get("prompt"))
    # Tools come before the messages in chat templates, and models have prefixes of their own.
    return None if text is None else json.dumps([fields.get("model"), fields.get("tools"), text])


def _messages(messages: Any) -> str | None:
    if not isinstance(messages, list):
        return None
    first: list[Any] = []
    for message in cast("list[Any]", messages):
        if not isinstance(message, dict):
            return None
        turn = cast("dict[str, Any]", message)
        first.append([turn.get("role"), turn.get("content")])
        if turn.get("role") == "user":
            break
    return json.dumps(first)[:BEGINNING]


def _prompt(prompt: Any) -> str | None:
    first = cast("list[Any]", prompt)[0] if isinstance(prompt, list) and prompt else prompt
    if isinstance(first, int):
        first = prompt  # one prompt, of tokens
    return json.dumps(cast("list[Any] | str", first)[:BEGINNING]) if isinstance(first, list | str) else None


def order(key: str | None, loads: Mapping[str, int], spare: int) -> list[str]:
    """Replicas by preference.

    Rendezvous hashing: each key has an order of its own, and when a replica goes or comes only the keys whose first
    one it is move. A replica is put behind the least busy one when it has more than `spare` requests more.

    Args:
        key: from `beginning`; None goes to the least busy one.
        loads: requests under way, by replica.
        spare: difference that is borne for what is known there.
    """
    if key is None:
        return sorted(loads, key=lambda name: (loads[name], name))
    ranked = sorted(loads, key=lambda name: _weight(key, name), reverse=True)
    least = min(loads.values(), default=0)
    # Stable: among the busy, and among the others, the key's own order stays.
    return sorted(ranked, key=lambda name: loads[name] - least > spare)


def _weight(key: str, name: str) -> bytes:
    return hashlib.blake2b(f"{name}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
