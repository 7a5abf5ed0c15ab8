"""Lane: the buckets of one team, some of which have started before the step that decides what moves.

A bucket that starts in `backward` is sent as if all of its parameters moved, and nothing of it is kept. What ranks have sent
or computed by the time of the step is completed by all of them, so that their collectives meet whatever was decided; a bucket
of which something does not move is then sent again.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist

from schatten.placements.flight import Context, Flight
from schatten.placements.local import Local
from schatten.placements.schedule import Bucket, whole_step
from schatten.placements.team import Team

Moving = Mapping[int, Local]

NOTHING = Context((), (), None, None)


class Lane:
    """The buckets of `team`, on a process group for each direction: within one, collectives must meet in one order.

    `flights` are those that have started since the last step, the first buckets in their order, of which the first `computed`
    are on their way back; `goal` has the most of both that any rank has come to.
    """

    def __init__(self, team: Team, there: dist.ProcessGroup, back: dist.ProcessGroup) -> None:
        self.buckets = team.buckets
        self.wire = team.wire._replace(group=there, back=back)
        self.numbers = [_numbers(bucket) for bucket in team.buckets]
        self.flights: list[Flight] = []
        self.computed = 0
        self.goal = (0, 0)
        self.device = torch.get_device_module(self.wire.device)
        self.stream = self.device.Stream()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A stream of its own, after what the current one has been given: nothing there waits for what travels."""
        self.stream.wait_stream(self.device.current_stream())
        with self.device.stream(self.stream):
            yield

    def join(self) -> None:
        """Let the current stream wait for what was done aside."""
        self.device.current_stream().wait_stream(self.stream)

    @property
    def ahead(self) -> tuple[int, int]:
        return len(self.flights), self.computed

    @property
    def next(self) -> set[int]:
        """The parameters of the bucket that starts next."""
        started = len(self.flights)
        return self.numbers[started] if started < len(self.numbers) else set()

    def start(self, moving: Moving, context: Context) -> None:
        """Send the next bucket to its owners, ahead of the step."""
        flight = Flight(self.wire, self.buckets[len(self.flights)], moving, context)
        flight.start(keep=False)
        self.flights.append(flight)

    def compute(self) -> None:
        """Compute the buckets that have arrived, and send them back, ahead of the step; those that depend on lr wait for it."""
        while self.computed < len(self.flights) and self._arrived():
            flight = self.flights[self.computed]
            if any(whole_step(t.rule) for t in flight.travellers):
                return
            flight.compute()
            self.computed += 1

    def _arrived(self) -> bool:
        # A device's stream may wait for what is about to arrive, the host may not.
        if self.wire.device.type != "cpu":
            return self.computed + 1 < len(self.flights)
        return self.flights[self.computed].arrived()

    def fly(self, moving: Moving, context: Context) -> list[Flight]:
        """Take the step of `moving`, the same on every rank; what is on its way back."""
        sent = self._sent(moving, context)
        void = [flight for flight in sent if not flight.moving]
        # What the next forward needs first comes first.
        rest = [*reversed(self.buckets[len(sent) :]), *(flight.bucket for flight in void)]
        line, waiting = deque(self._to_compute(sent)), [flight for flight in sent if flight.moving]
        for bucket in [*rest, None]:
            if bucket is not None:
                flight = Flight(self.wire, bucket, self._of(bucket, moving), context)
                flight.start()
                line.append(flight)
                waiting.append(flight)
            # All but the last, whose pieces travel meanwhile.
            while len(line) > (bucket is not None):
                line.popleft().compute()
        self._end(sent, void)
        return waiting

    def drop(self) -> None:
        """Take no step: complete what ranks have sent and computed."""
        sent = self._sent({}, NOTHING)
        for flight in self._to_compute(sent):
            flight.compute()
        self._end(sent, sent)

    def _sent(self, moving: Moving, context: Context) -> list[Flight]:
        """The buckets that some rank has sent, sent by this one too; they go on with nothing if not all of them moves."""
        for k, bucket in enumerate(self.buckets[: self.goal[0]]):
            own = self._of(bucket, moving)
            own = own if len(own) == len(self.numbers[k]) else {}
            if k < len(self.flights):
                self.flights[k].take(own, context)
            else:
                self.flights.append(Flight(self.wire, bucket, own, context))
                self.flights[k].start()
        return self.flights

    @staticmethod
    def _of(bucket: Bucket, moving: Moving) -> Moving:
        """Those in `moving` that are in a bucket."""
        return {number: moving[number] for number in _numbers(bucket) if number in moving}

    def _to_compute(self, sent: list[Flight]) -> list[Flight]:
        computed = self.goal[1]
        return [flight for k, flight in enumerate(sent) if k >= self.computed and (flight.moving or k < computed)]

    def _end(self, sent: list[Flight], void: list[Flight]) -> None:
        for k, flight in enumerate(sent):
            if flight in void:
                (flight.back if k < self.goal[1] else flight.sent).wait()
        self.flights, self.computed, self.goal = [], 0, (0, 0)


def _numbers(bucket: Bucket) -> set[int]:
    return {item.traveller.number for item in bucket.items}
