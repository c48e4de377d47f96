"""What the training options of a command line, or of an old record, stand for."""

import click
import pytest

from training.loop import Settings
from training.optim import Optim
from training.options import optimizer, training_options, training_settings


def parsed(*words, **defaults):
    @click.command()
    @training_options(**defaults)
    def command(**opts):
        return opts

    return command.main([str(word) for word in words], standalone_mode=False)


def test_without_options_it_is_the_default_optimizer():
    settings, optim = training_settings(parsed(), 20)
    assert (settings, optim) == (Settings(2, batch=8), Optim())


def test_a_command_has_defaults_of_its_own():
    opts = parsed("--lr", 0.5, optimizer="sgd", schedule="constant", clip=0.0, eps_root=1e-8)
    assert optimizer(opts) == Optim("sgd", 0.5, "constant", clip=0.0, eps_root=1e-8)
    settings, _ = training_settings(parsed(shuffle=False, batch=4), 20)
    assert settings == Settings(5, batch=4, shuffle=False)


def test_every_option_arrives():
    words = (
        "--optimizer sgd --lr 0.1 --schedule polynomial --power 2 --warmup 3 --start 0.5 --end 0.2 "
        "--weight-decay 0.3 --decay *.mlp.* --decay *.ln_1.* --beta1 0.6 --beta2 0.7 "
        "--eps-root 0.01 --momentum 0.8 --nesterov --clip 2 --seed 5 --accumulate 2 --no-shuffle"
    )
    settings, optim = training_settings(parsed(*words.split()), 20)
    assert settings == Settings(2, 8, 2, 5, shuffle=False)
    assert optim == Optim(
        "sgd", 0.1, "polynomial", 3, 0.2, 0.3, 0.6, 0.7, 1e-8, 0.01, 0.8, True, 2.0, 2.0, 0.5,
        ("*.mlp.*", "*.ln_1.*"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "words, momentum",
    [((), 0.0), (("--optimizer", "sgd"), 0.0), (("--optimizer", "muon"), 0.95),
     (("--optimizer", "muon", "--momentum", 0), 0.0)],
)  # fmt: skip
def test_muon_has_momentum_unless_told(words, momentum):
    assert optimizer(parsed(*words)).momentum == momentum


def test_steps_of_a_finite_run_draw_every_row_equally_often():
    def counts(*words, **how):
        settings, _ = training_settings(parsed(*words), 18, **how)
        return settings.steps, settings.drawn

    assert counts("--epochs", 2) == (4, None)  # 36 rows in batches of 8
    assert counts("--epochs", 2, finite=True) == (5, 36)
    assert counts("--epochs", 2, "--steps", 3, finite=True) == (3, None)
    assert counts("--batch", 100) == (1, None)


def test_an_old_record_has_fewer_options():
    """Of a run that began before there were --power, --start, --decay, --beta1 and --nesterov."""
    old = {"optimizer": "adamw", "lr": 0.1, "schedule": "linear", "warmup": 2, "end": 0.0,
           "weight_decay": 0.1, "beta2": 0.99, "momentum": 0.0, "clip": 0.5}  # fmt: skip
    assert optimizer(old) == Optim("adamw", 0.1, "linear", 2, 0.0, 0.1, b2=0.99, clip=0.5)
    assert optimizer(old | {"decay": ["*"]}).decay == ("*",)  # as JSON has a tuple
