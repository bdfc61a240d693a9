"""Signs of life between processes: a machine that is lost, cut off or frozen sends no error, and a collective waits for it.

Each process tells the store from time to time what it is doing, and looks whether the next rank has told anything new. It
counts its own looks, not seconds: a process that was stopped with the others, or that waits for its disk, is not lost.
"""

import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

LOOKS = 12
"""Looks within the time after which a process is lost: so many it takes until all know"""
MISSED = 7
"""Looks without a sign, after which the table of all ranks is read twice"""
ENDED = "ended"
LOST = "minillama/lost"
"""Key of the ranks that are lost, and the message about them, once a process has printed it"""
_doing = "start-up", time.monotonic()


def stand(where: str) -> None:
    """Notes what this process does from now on, for messages about processes that are missing: "step 12"."""
    global _doing
    _doing = where, time.monotonic()


@contextmanager
def quiet() -> Iterator[None]:
    """Around requests to the store: if it has ended with rank 0, PyTorch would print a stack trace of its own."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


class Heartbeat:
    """Of one process. tell: prints an error, on whichever rank calls it."""

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, lost_seconds: float, tell: Callable[[str], None]
    ) -> None:
        self.store: dist.Store = store.clone()  # type: ignore[attr-defined]  # a connection of its own: the main thread may wait in the other one
        self.rank, self.world_size, self.lost_seconds, self.tell = rank, world_size, lost_seconds, tell
        self.interval = lost_seconds / LOOKS
        self.next, self.first = (rank + 1) % world_size, ""
        self.count, self.silent = 0, 0
        self.over = threading.Event()
        self._post()
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self._beat, self._judge)]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Ends the signs of life, and tells that they are not missed."""
        self.over.set()
        for thread in self.threads:  # one in a request while the interpreter ends would abort the process
            thread.join(1)
        with quiet(), suppress(dist.DistError):
            self.store.set(f"minillama/sign/{self.rank}", ENDED)  # and no sign after it, which would be missed

    def wait_for_readers(self) -> None:
        """On rank 0, if the store ends with it: waits a little until the others that are left have ended and know why."""
        if self.rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        with suppress(dist.DistError):
            told = self._told()
            deadline = time.monotonic() + (2 * self.interval if told else 1)
            left = set(range(1, self.world_size)) - set(told[0] if told else ())
            while time.monotonic() < deadline and any(self._table()[r] != ENDED for r in left):
                time.sleep(0.02)

    def tell_others(self, lost: list[int], text: str) -> None:
        """Ends all others, at their next look. Of the lost ones, those that are alive after all print the text."""
        with suppress(dist.DistError):
            self.store.set(LOST, f"{' '.join(map(str, lost))}\t{text}")

    def wait_until_told(self) -> None:
        """Until the process that speaks has printed its message: if this one keeps the store, that one needs it."""
        deadline = time.monotonic() + 4 * self.interval
        while time.monotonic() < deadline and not self._told():
            time.sleep(0.05)

    def _told(self) -> tuple[list[int], str] | None:
        """What another has told by tell_others."""
        if not self.store.check([LOST]):
            return None
        ranks, _, text = self.store.get(LOST).decode().partition("\t")
        return [int(r) for r in ranks.split()], text

    def speaks_first(self) -> bool:
        """Whether no process has said what is wrong. If one has, this one has nothing to add."""
        return self.store.add("minillama/errors", 1) == 1

    def someone_erred(self) -> bool:
        return self.store.check(["minillama/errors"])

    def missing(self) -> tuple[list[int], str]:
        """Which ranks give no sign of life, and where they stood, as text. Takes the time of some looks."""
        before = self._table()
        for _ in range(5):  # still giving signs: another rank may look for missing ones, too
            time.sleep(self.interval / 2)
            self._post()
        after = self._table()
        gone = [r for r in range(self.world_size) if before[r] == after[r] != ENDED and r != self.rank]
        if not gone:
            return [], ""
        machines = sorted({_machine(after[r]) for r in gone})
        left = [r for r in range(self.world_size) if r not in gone]
        lost = ("its" if len(gone) == 1 else "their") + (" machine is" if len(machines) == 1 else " machines are")
        return gone, (
            f"no sign of life of {_ranks(gone)} on {', '.join(machines)}: {lost} lost, frozen or cut off. Last seen: "
            f"{_standing(after, gone)}; of the others: {_standing(after, left)}"
        )

    def store_is_gone(self) -> str:
        """What to say of rank 0's machine when the store, which is there, is gone or does not answer."""
        last = f", last seen {_standing([self.first], [0])}" if self.first else ""
        return (
            f"no answer from {os.environ.get('MASTER_ADDR')}, where rank 0 is{last}: unless it says why, that machine, or "
            f"the network to it, is lost or frozen; {platform.node()} stood in {_doing[0]}"
        )

    def standing(self) -> str:
        """Where each rank stands, and for how long."""
        return _standing(self._table(), range(self.world_size))

    def _post(self) -> None:
        if self.over.is_set():  # a sign after the last one would be missed
            return
        self.count += 1
        where, since = _doing
        sign = f"{self.count}\t{time.monotonic() - since:.0f}\t{platform.node()}\t{where}"
        self.store.set(f"minillama/sign/{self.rank}", sign)

    def _beat(self) -> None:
        seen, missed, failing = "", 0, 0
        with suppress(dist.DistError):  # the store has ended, and with it the process that keeps it
            while not self.over.wait(self.interval):
                self._post()
                if told := self._told():
                    self._end(told[1] if self.rank in told[0] else "")
                # One has ended with an error: not every collective that waits for it is told so.
                failing += self.someone_erred()
                if failing >= LOOKS:
                    self.tell_others([], "")  # if this one keeps the store, it waits until they have ended
                    self._end("")
                keys = [f"minillama/sign/{r}" for r in (0, self.next)]
                self.silent = 0
                if not self.store.check(keys):
                    continue  # they have not begun
                self.first, sign = (value.decode() for value in self.store.multi_get(keys))
                missed = missed + 1 if sign == seen and sign != ENDED else 0
                seen = sign
                if missed >= MISSED:
                    self._report()

    def _report(self) -> None:
        gone, text = self.missing()
        if gone and self.speaks_first():
            self.tell_others(gone, text)
            self._end(text)

    def _judge(self) -> None:
        """Ends the process if the store does not answer: then nobody can tell which machine is lost."""
        while not self.over.wait(self.interval):
            self.silent += 1
            if self.silent < LOOKS:
                continue
            first_here = os.environ.get("LOCAL_RANK", "0") == "0"
            text = f"{self.store_is_gone()} (waited for {self.lost_seconds:g} s)" if first_here else ""
            self._end(text, store_answers=False)

    def _end(self, text: str, store_answers: bool = True) -> None:
        """Ends the process at once: its main thread waits for what will never come."""
        if text:
            self.tell(f"\nerror: {text}")
        sys.stdout.flush()
        if store_answers:
            with suppress(dist.DistError):
                self.store.set(f"minillama/sign/{self.rank}", ENDED)
            self.wait_for_readers()
        os._exit(1)

    def _table(self) -> list[str]:
        """What each rank last told."""
        keys = [f"minillama/sign/{r}" for r in range(self.world_size)]
        return [value.decode() for value in self.store.multi_get(keys)]


def _machine(sign: str) -> str:
    return sign.split("\t")[2]


def _standing(signs: list[str], ranks: "range | list[int]") -> str:
    """ "ranks 0-2 in step 13 for 20 s, rank 3 in ..." """
    places: dict[str, list[int]] = {}
    ages: dict[str, int] = {}
    for r in ranks:
        _, age, _, where = signs[r].split("\t") if signs[r] != ENDED else ("", "0", "", "its end")
        places.setdefault(where, []).append(r)
        ages[where] = max(int(age), ages.get(where, 0))
    return ", ".join(f"{_ranks(found)} in {where} for {ages[where]} s" for where, found in places.items())


def _ranks(numbers: list[int]) -> str:
    """ "rank 3", "ranks 0-2, 5" """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    text = ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)
    return f"rank{'s' * (len(numbers) > 1)} {text}"
