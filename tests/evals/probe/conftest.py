"""A small view with everything a page may meet."""

import numpy as np
import pytest

from evals.probe.view import View

HOSTILE = (
    b"</script><script>window.hit = 1</script>",
    b"<img src=x onerror='window.hit = 1'>",
    b"&lt;b&gt;",
    "\u202eevil\u2066".encode(),
    b"\x00\x1b\r",
    b"\xff",
)
WORDS = (
    b"It lay on| the| floor of| the| house by| the| sea,| and| all| day| it| was|\n|\n|as| still|"
)


@pytest.fixture(scope="session")
def view() -> View:
    """Four layers; the last tells best. Two tokens make one character; some values are NaN."""
    prose = WORDS.replace(b" ", b"| ").replace(b"||", b"|").split(b"|")
    tokens = [b" caf\xc3", b"\xa9", b"", *HOSTILE, *[w for w in prose * 4 if w], b"\xe6\xbc"]
    truth_T = np.array([*(int(token == b" the") for token in tokens[1:]), -1], np.int8)
    noise_LT = np.random.default_rng(0).normal(size=(4, len(tokens)))
    signal_L = np.array([0.5, 1.0, 2.0, 4.0])
    logit_LT = signal_L[:, None] * (2 * truth_T - 1) + noise_LT
    p_LT = (1 / (1 + np.exp(-logit_LT))).astype(np.float32)
    p_LT[:, 0] = np.nan
    p_LT[1, 5:9] = np.nan
    p_LT[:, 20] = 1.0
    metrics = [
        dict(balanced_accuracy=0.5 + 0.1 * layer, auroc=0.6 + 0.1 * layer, ap=0.2, mcc=-0.1,
             brier=0.05, ece=None, tn=40_000 + layer, fp=900, fn=80, tp=1_200)
        for layer in range(4)
    ]  # fmt: skip
    metrics[1]["auroc"] = None
    layers = ["embed", *(f"resid_post.{layer}" for layer in range(3))]
    about = {"Target": "“ the”", "Model": "<b>tiny</b>"}
    thresholds_L = np.array([0.5, 0.45, 0.625, 0.5])
    return View("Is the next token “ the”?", tokens, layers, p_LT, truth_T, thresholds_L, metrics,
                about)  # fmt: skip
