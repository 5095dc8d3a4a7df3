"""Methods are found by their rooms, cards are read without running them, and wrong names are met with the right one."""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from subquad.core import registry
from subquad.core.card import Card
from subquad.core.config import config_from_dict, config_to_dict
from subquad.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergenceError,
    SubquadError,
    UnsupportedError,
    nearest,
)
from subquad.core.registry import FAMILIES, load, methods, read_card
from subquad.train.recipe import Recipe


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_read_card_does_not_run_the_module(tmp_path):
    source = write(
        tmp_path / "m.py",
        'raise SystemExit("was run")\nCARD = Card(title="T", entry="E", gives="g", status="stable", causal=False)\n',
    )
    assert read_card(source) == Card(title="T", entry="E", gives="g", status="stable", causal=False)
    assert read_card(write(tmp_path / "n.py", "x = 1\n")) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Card('T', entry='E', gives='g', status='stable')", r"write it so"),
        ("Card(**{})", "write it so"),
        ("Card(title=T, entry='E', gives='g', status='stable')", "literals only"),
        ("Card(title='T', entry='E', gives='g', status='stabel')", "did you mean 'stable'"),
        ("Card(titel='T', entry='E', gives='g', status='stable')", "unknown key 'titel'; did you mean 'title'"),
        ("Card(title='T', entry='E', gives='g')", "expected status"),
    ],
)
def test_a_wrong_card_says_how_to_write_it(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_card(write(tmp_path / "m.py", f"CARD = {text}\n"))


def test_methods_are_files_and_folders_with_a_card(tmp_path, monkeypatch):
    card = 'CARD = Card(title="T", entry="E", gives="g", status="incubating")\n'
    write(tmp_path / "mixers/__init__.py", card)
    write(tmp_path / "mixers/one.py", card)
    write(tmp_path / "mixers/two/__init__.py", card)
    write(tmp_path / "mixers/helper.py", "")
    write(tmp_path / "mixers/notes.txt", card)
    monkeypatch.setattr(registry, "PACKAGE", tmp_path)
    methods.cache_clear()
    try:
        assert list(methods("mixers")) == ["one", "two"]
    finally:
        methods.cache_clear()


def test_every_registered_entry_loads():
    loaded = {(f, slug): load(f, slug) for f in FAMILIES for slug in methods(f)}
    assert len(loaded) > 0
    for (family, slug), entry in loaded.items():
        assert callable(entry) or isinstance(entry, Recipe), (family, slug)


def test_wrong_names_are_met_with_the_right_ones():
    with pytest.raises(ConfigError, match="did you mean 'mixers'"):
        methods("mixer")
    with pytest.raises(ConfigError, match="did you mean 'attention'"):
        load("mixers", "atention")


def test_listing_methods_imports_no_torch():
    code = (
        "import sys; from subquad.core.registry import FAMILIES, methods; [methods(f) for f in FAMILIES];"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@dataclass(frozen=True)
class Config:
    d_model: int
    window: int = 64
    names: list[str] = field(default_factory=list)
    derived: int = field(init=False, default=0)


def test_config_round_trip():
    config = Config(8, names=["a"])
    values = config_to_dict(config)
    assert values == {"d_model": 8, "window": 64, "names": ["a"], "derived": 0}
    assert config_from_dict(Config, {k: v for k, v in values.items() if k != "derived"}) == config


def test_config_refuses_unknown_and_missing_keys():
    with pytest.raises(ConfigError, match="layer 3: unknown key 'windw'; did you mean 'window'"):
        config_from_dict(Config, {"d_model": 8, "windw": 1}, where="layer 3")
    with pytest.raises(ConfigError, match="Config: expected d_model, got"):
        config_from_dict(Config, {"window": 1})
    with pytest.raises(ConfigError, match="unknown key 'derived'"):
        config_from_dict(Config, {"d_model": 8, "derived": 1})


def test_config_to_dict_unfolds_nested_configs():
    nested = dataclasses.make_dataclass("Nested", [("inner", Config)], frozen=True)
    assert config_to_dict(nested(Config(8)))["inner"]["d_model"] == 8


def test_nearest_names_one_or_all():
    assert nearest("mamba", ["mamba2", "attention"]) == "; did you mean 'mamba2'?"
    assert nearest("xyz", ["b", "a"]) == "; known: a, b"
    assert nearest("xyz", []) == ""
    many = nearest("xyz", [f"{i:02}" for i in range(40)])
    assert many.startswith("; known: 00, 01, ") and many.endswith(", 11 and 28 more")


@dataclasses.dataclass(frozen=True)
class Typed:
    name: str
    window: int | None = None
    rate: float = 0.5
    wide: bool = False
    layers: tuple[Mapping[str, Any], ...] = ()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"window": "x"}, "layer 3: window: expected int or None, got 'x'; correct it"),
        ({"window": True}, "window: expected int or None, got True"),
        ({"window": 1.5}, "window: expected int or None, got 1.5"),
        ({"wide": 1}, "wide: expected bool, got 1"),
        ({"rate": "high"}, "rate: expected float, got 'high'"),
        ({"layers": 3}, "layers: expected tuple, got 3"),
        ({"name": None}, "name: expected str, got None"),
    ],
)
def test_a_value_of_another_type_is_refused(value, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_from_dict(Typed, {"name": "a"} | value, where="layer 3")
    fine = {"name": "a", "window": None, "rate": 1, "layers": [{"a": 1}]}
    assert config_from_dict(Typed, fine).rate == 1


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (ConfigError, ValueError),
        (UnsupportedError, NotImplementedError),
        (CheckpointError, OSError),
        (DataError, ValueError),
        (DivergenceError, ArithmeticError),
    ],
)
def test_errors_are_ours_and_pythons(error, builtin):
    assert issubclass(error, SubquadError)
    assert issubclass(error, builtin)
    assert str(error("expected, got, remedy")) == "expected, got, remedy"
