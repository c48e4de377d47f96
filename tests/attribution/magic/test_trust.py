"""A verdict has a reason, and each reason appears exactly when it should."""

import pytest

from attribution.magic.trust import Facts, smoothness_in_words, trust

SOUND = Facts(True, "adamw", 1e-6, 0.5, 1e-2, 0.99, False, "float32", 100)


def test_a_sound_run_is_trusted():
    assert trust(SOUND) == ("trusted", [])
    assert trust(SOUND._replace(optimizer="sgd", eps_root=0.0, smoothness=None)).reasons == []


@pytest.mark.parametrize(
    "change, verdict, words",
    [
        ({"finite": False}, "not to be trusted", ["not finite", "--eps-root 1e-06", "100 steps"]),
        ({"smoothness": 0.8996}, "not to be trusted", ["Metasmoothness is 0.90, below 0.9:"]),
        ({"smoothness": 0.9}, "doubtful", ["Metasmoothness is 0.90, below 0.95", "roughly"]),
        ({"dtype": "bfloat16"}, "not to be trusted", ["--dtype float32"]),
        ({"eps_root": 0.0}, "doubtful", ["--eps-root 0", "nearly unbounded", "1e-8 to 1e-6"]),
        ({"eps_root": 1e-17}, "doubtful", ["--eps-root 1e-17"]),
        ({"smoothness": None}, "doubtful", ["not measured", "attribute metasmoothness"]),
        ({"loss_drop": 0.0099}, "doubtful", ["barely trained", "0.0099 nats", "--eps-root 1e-06"]),
        ({"loss_drop": 0.0}, "doubtful", ["barely trained"]),
        ({"displacement": 9e-5}, "doubtful", ["barely trained", "9e-05 of their length"]),
        ({"loss_drop": -0.2}, "doubtful", ["rose by 0.2 nats"]),
        ({"dropout": True}, "doubtful", ["Dropout was on"]),
        ({"replay": 0.02}, "not to be trusted", ["2 % of the way"]),
    ],
)
def test_each_reason_by_itself(change, verdict, words):
    found = trust(SOUND._replace(**change))
    assert found.verdict == verdict
    [reason] = found.reasons
    assert all(word in reason for word in words) and reason.endswith(".")


@pytest.mark.parametrize(
    "change",
    [
        {"smoothness": 0.95},
        {"eps_root": 1e-10},
        {"loss_drop": 0.01},
        {"displacement": 1e-4},
        {"replay": 0.01},
    ],
)
def test_on_a_threshold_there_is_no_reason(change):
    assert trust(SOUND._replace(**change)).reasons == []


def test_muons_few_vectors_need_no_eps_root():
    assert trust(SOUND._replace(optimizer="muon", eps_root=0.0)).reasons == []


def test_eps_root_is_no_matter_of_sgd():
    plain = SOUND._replace(optimizer="sgd", eps_root=0.0)
    for change in ({"finite": False}, {"loss_drop": 0.001}):
        [reason] = trust(plain._replace(**change)).reasons
        assert "--eps-root 0" not in reason


def test_the_worst_reason_comes_first_and_decides():
    found = trust(SOUND._replace(dropout=True, finite=False, loss_drop=-1.0))
    assert found.verdict == "not to be trusted" and len(found.reasons) == 3
    assert "not finite" in found.reasons[0]
    barely = trust(SOUND._replace(loss_drop=0.001, displacement=1e-5))
    assert len(barely.reasons) == 1 and "nats and parameters moved" in barely.reasons[0]


def test_smoothness_in_words():
    assert "as MAGIC's scores need" in smoothness_in_words(0.9)
    assert "predict retraining badly" in smoothness_in_words(0.899)
    for help in ("--eps-root", "--batch", "--lr", "fewer steps"):
        assert help in smoothness_in_words(0.5)
    assert "not finite" in smoothness_in_words(None)
