"""What the report tells of a training."""

from subquad.convert.transplant.account import training


def test_every_loss_has_its_unit_and_layers_their_errors():
    lines = [
        {"stage": "first", "tokens": 10, "loss": 0.4, "layers": [0.2, 0.6]},
        {"stage": "first", "tokens": 20, "loss": 0.2, "layers": [0.1, 0.3]},
        {"stage": "whole", "tokens": 10, "loss": 3.0, "kl": 1.0, "cross_entropy": 2.0},
    ]
    first, whole = training(lines, [1, 4])
    loss, errors = first.parts
    assert (loss.y_label, loss.series) == ("relative error", {"loss": [(10, 0.4), (20, 0.2)]})
    assert errors.series == {"first tenth": [(0.0, 0.2), (1.0, 0.6)], "last tenth": [(0.0, 0.1), (1.0, 0.3)]}
    (loss,) = whole.parts
    assert (loss.y_label, loss.series) == ("nats a token", {"kl": [(10, 1.0)], "cross_entropy": [(10, 2.0)]})
