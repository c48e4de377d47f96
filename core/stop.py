"""Being told to stop: a long command ends at its next safe place and can be continued."""

import signal


class Stop:
    """Within the block, the first SIGTERM or SIGINT asks for a stop, the second kills."""

    asked = False

    def __enter__(self) -> "Stop":
        self.old = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _ask(self, number: int, frame: object) -> None:
        del frame
        self.asked = True
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
