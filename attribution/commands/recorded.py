"""The training that a folder of MAGIC's scores is about, as its `info.json` records it."""

from typing import Any, NamedTuple

import click

# Fields of a recorded training by the options that set them, where the names differ.
FIELDS = {"optimizer": "name", "beta1": "b1", "beta2": "b2", "epochs": "drawn"}


class Recorded(NamedTuple):
    """settings, optim, execution: as `training.course.Course` takes them. lora: a spec or None."""

    settings: Any
    optim: Any
    execution: Any
    lora: Any
    model: str
    control: dict[str, Any] | None

    def start(self, loaded: Any) -> Any:
        """`loaded` with the adapter that was trained; InputError for another model."""
        from core import adapter
        from core.errors import InputError

        if loaded.fingerprint != self.model:
            raise InputError("the scores are about the training of another model than --model; "
                             "give the one that it began with")  # fmt: skip
        if self.lora is None:
            return loaded
        seed = self.settings.seed
        held = loaded.adapter or adapter.Adapter(
            self.lora, adapter.init(self.lora, loaded.config, seed)
        )
        return loaded._replace(adapter=held._replace(spec=self.lora))


def recorded(ctx: click.Context, opts: dict[str, Any], info: dict[str, Any]) -> Recorded | None:
    """What `info` records, None where it records no training.

    InputError for an option on the command line that says another thing. In `opts`, options of
    training are set to what holds.
    """
    import jax

    from core.adapter import LoraSpec
    from core.config import Execution
    from core.errors import InputError
    from core.files import read_npy
    from training.loop import Settings
    from training.optim import Optim

    if "training" not in info:
        return None
    held, n = info["training"], len(read_npy(opts["scores"] / "scores.npy"))
    parts = [held["settings"], held["optim"], held["execution"], held.get("lora")]
    settings, optim, how, lora = (part and _tuples(part) for part in parts)
    fields = settings | optim | how
    for name, value in list(opts.items()):
        field = FIELDS.get(name, name)
        if field not in fields:
            continue
        known = fields[field]
        if name == "epochs" and known is not None:
            known //= n
        explicit = ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if explicit and value != known:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} {value} is not what {opts['scores']} was trained with "
                             f"({known}); leave {option} out")  # fmt: skip
        if known is not None and field not in how:
            opts[name] = known
    if how["dtype"] == "float64":
        jax.config.update("jax_enable_x64", True)
    return Recorded(
        Settings(**settings),
        Optim(**optim),
        Execution(**how),
        lora and LoraSpec(**lora),
        info["pool"]["model"],
        info.get("control"),
    )


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only, and what is static under jit must be hashable."""
    return {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
