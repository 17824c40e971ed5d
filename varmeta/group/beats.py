"""Which of several processes live: each writes now and then that it does, and reads the others."""

from __future__ import annotations

import os
import socket
import threading
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

# Seconds from one beat to the next, and without any before a process counts as gone: at all times,
# and once a connection to some process is closed.
EVERY, SILENT, CLOSED = 1.0, 20.0, 5.0
# For how many seconds at most the store is asked.
REQUEST = 30.0
# For how many seconds who keeps the store waits, where it fails, for the others to read why.
LINGER = 5.0


class Beats:
    """The beats of a process, in a thread of its own, and what it hears of the others.

    It needs a connection of its own, since another thread's request may wait for long.

    host, port: where the store of the processes is kept.  prefix: before all keys.
    """

    def __init__(self, host: str, port: int, prefix: str, rank: int, size: int) -> None:
        self.rank, self.size, self.prefix = rank, size, prefix
        self._store = _connected(host, port)
        self._number, self._over = 0, threading.Event()
        self._heard = dict.fromkeys(range(size), ("", monotonic()))
        self._ended: dict[int, str] = {}
        self._store.set(f"{prefix}/end/{rank}", "")
        self._beat()
        self._thread = threading.Thread(target=self._run, name="varmeta beats", daemon=True)

    def start(self) -> None:
        """Beat from here on; all processes must have been made by now."""
        now = monotonic()
        self._heard = {rank: (known, now) for rank, (known, _) in self._heard.items()}
        self._thread.start()

    def stop(self) -> None:
        """End the thread: at the end of the process it may not stand in a request."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(2 * REQUEST)

    def end(self, why: str) -> None:
        """Tell the others that this process does not go on, and why."""
        try:
            self._store.set(f"{self.prefix}/end/{self.rank}", why)
        except RuntimeError:  # nobody is left to be told
            return
        until = monotonic() + LINGER
        others = set(range(self.size)) - {self.rank}
        while self.rank == 0 and monotonic() < until and not others <= set(self._ended):
            self._over.wait(0.1)

    def gone(self, closed: bool = False) -> str | None:
        """Who has ended or is silent, in a sentence; None where all live.

        closed: whether a connection is closed, so that somebody must be.
        """
        for rank, why in sorted(self._ended.items()):
            # what that one in turn was told
            return why if why.startswith("process ") else f"{self._called(rank)} ended: {why}"
        now = monotonic()
        for rank, (_, at) in self._heard.items():
            if rank != self.rank and now - at > (CLOSED if closed else SILENT):
                return (
                    f"{self._called(rank)} has given no sign of life for {now - at:.0f} s: it was "
                    "killed, or its machine cannot be reached"
                )
        return None

    def _called(self, rank: int) -> str:
        where = self._heard[rank][0].partition(" ")[2]
        return f"process {rank} of {self.size}" + (f" ({where})" if where else "")

    def _run(self) -> None:
        try:
            while not self._over.wait(EVERY):
                self._beat()
                self._listen()
        except RuntimeError:  # the store is lost, and with it who keeps it: all fall silent
            return

    def _beat(self) -> None:
        self._number += 1
        where = f"{socket.gethostname()}, process id {os.getpid()}"
        self._store.set(f"{self.prefix}/beat/{self.rank}", f"{self._number} {where}")

    def _listen(self) -> None:
        keys = [f"{self.prefix}/{kind}/{rank}" for kind in ("beat", "end") for rank in self._heard]
        found = [value.decode() for value in self._store.multi_get(keys)]
        now = monotonic()
        for rank, (beat, end) in enumerate(
            zip(found[: self.size], found[self.size :], strict=True)
        ):
            if beat != self._heard[rank][0]:
                self._heard[rank] = beat, now
            if end and rank != self.rank:
                self._ended[rank] = end


def _connected(host: str, port: int) -> TCPStore:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    made: TCPStore = TCPStore(
        host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=REQUEST)
    )
    return made
