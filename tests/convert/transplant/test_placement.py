import pytest
import torch

from subquad.convert.transplant import transplant
from subquad.convert.transplant.placement import place_heads
from subquad.core.errors import ConfigError
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

LAYER = {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}


def test_all_none_and_some_heads_kept():
    placed = place_heads([2, 2, 2, 3], {0: [1, 0], 2: [1], 3: [2, 0]}, "windowed_linear", {"window": 9})
    some = {"mixer": "windowed_linear", "window": 9}
    assert placed == {
        1: some,
        2: {"mixer": "parallel", "parts": [{"mixer": "attention", "kv_heads": [1]}, some | {"kv_heads": [0]}]},
        3: {"mixer": "parallel", "parts": [{"mixer": "attention", "kv_heads": [0, 2]}, some | {"kv_heads": [1]}]},
    }


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        ({4: [0]}, r"\[0\] in layer 4"),
        ({-1: [0]}, r"\[0\] in layer -1"),
        ({1: [2]}, r"\[2\] in layer 1"),
        ({1: [1, 1]}, r"\[1, 1\] in layer 1"),
        ({i: [0, 1] for i in range(4)}, "keep fewer"),
    ],
)
def test_heads_that_are_not_there_are_refused(kept, says):
    with pytest.raises(ConfigError, match=says):
        place_heads([2] * 4, kept, "windowed_linear", {})
    with pytest.raises(ConfigError, match="gla"):
        place_heads([2] * 4, {}, "gal", {})


def test_a_student_with_the_same_attention_in_every_part_is_the_teacher():
    """A window as long as the text is full attention, so whatever the heads, nothing may change."""
    model = (
        Stack(ModelConfig(vocab_size=30, d_model=24, d_mlp=32, layers=(LAYER,) * 3))
        .double()
        .eval()
        .requires_grad_(False)
    )
    placed = place_heads([2] * 3, {0: [1], 2: [0, 1]}, "attention", {"window": 50})
    student = transplant(model, placed)
    assert [layer["mixer"] for layer in student.config.layers] == ["parallel", "attention", "attention"]
    assert [part["n_heads"] for part in student.config.layers[0]["parts"]] == [2, 2]
    tokens_bt = torch.randint(30, (2, 40))
    torch.testing.assert_close(student(tokens_bt), model(tokens_bt), rtol=1e-10, atol=1e-10)
    cut = transplant(model, place_heads([2] * 3, {0: [1], 2: [0, 1]}, "attention", {"window": 5}))
    with torch.no_grad():
        assert float((cut(tokens_bt) - model(tokens_bt)).abs().max()) > 1e-3
