"""Training on eight simulated devices, by data and by data and model, against one device."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# Runs of four steps of sgd with momentum in each way that the devices allow, of all parameters and
# of an adapter with dropout; what is trained, losses, gradient norms and the validation loss.
SCRIPT = """
import sys
from pathlib import Path
import jax, numpy as np
from core import adapter, checkpoint, families, schema
from core.hf import peft
from core.adapter import Adapter, LoraSpec
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.files import read_jsonl
from core.rows import load_rows, save_rows
from core.rundir import open_run
from training.loop import Settings, train
from training.optim import Optim

out = Path(sys.argv[1])
config = ModelConfig("gpt2", 32, 16, 8, 2, 2, 16, 4)
rng = np.random.default_rng(0)
save_rows(out / "rows", [rng.integers(0, 32, n) for n in rng.integers(4, 17, 19)])
rows = load_rows(out / "rows", 32, 16)
params = schema.init(families.rows(config), 2, 0)
spec = LoraSpec(3, 6.0, "all-linear", dropout=0.2)
lora = Adapter(spec, adapter.init(spec, config, 0), checkpoint.fingerprint(config, params))
results = {}
for parallel in eval(sys.argv[2]):
    for kind, start in (("all", None), ("lora", lora)):
        with open_run(out / f"{parallel} {kind}", "train lm", {}) as run:
            run.inputs()
            train(run, config, params, rows,
                  Settings(4, 16, 2, eval_every=4, save_every=2, model_parallel=parallel),
                  Optim("sgd", lr=0.3, momentum=0.9), Execution(layers="scan"), validation=rows,
                  adapter=start)
            run.finish()
        for line in read_jsonl(run.path / "metrics.jsonl"):
            for name in line.keys() & {"loss", "grad_norm", "tokens", "val_loss"}:
                results[f"{parallel} {kind} {name} {line['step']}"] = np.asarray(line[name])
    params_end = checkpoint.load_model(out / f"{parallel} all").params
    factors = peft.read(out / f"{parallel} lora" / "adapter", config).factors
    for kind, tree, of in (("all", params_end, families.rows(config)),
                           ("lora", factors, adapter.rows(spec, config))):
        for row in of:
            results[f"{parallel} {kind} {row.path}"] = np.asarray(schema.get(tree, row.path))
np.savez(out / "results.npz", **results)
print(jax.device_count())
"""


def results(folder, devices, parallel):
    folder.mkdir()
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(parallel)],
        env={**os.environ, "XLA_FLAGS": flags}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.split()[-1] == str(devices)
    with np.load(folder / "results.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    return results(folder / "one", 1, [1]), results(folder / "eight", 8, [1, 2])


@pytest.mark.parametrize("parallel", [1, 2], ids=["data", "data and model"])
def test_eight_devices_equal_one(both, parallel, close):
    """Sums run in another order, so float32's tolerance: parameters, losses, gradient norms."""
    one, eight = both
    expected = {key.removeprefix("1 "): value for key, value in one.items()}
    mark = f"{parallel} "
    found = {k.removeprefix(mark): v for k, v in eight.items() if k.startswith(mark)}
    assert expected.keys() == found.keys() and len(expected) == 16 + 8 + 2 * (4 * 3 + 1)
    close(found, expected)
