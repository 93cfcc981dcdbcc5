"""A loader's worker process: packs the rows of some lanes ahead of the model and sends them.

    openers, settings, lanes, states  ->  for each step {lane: (PackedSequence, LaneState)}

Numpy only: importing torch would cost each worker 2 s and 200 MB.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection

from codellama.data.packing import Lane, LaneState, PackedSequence, PackingSettings, Share
from codellama.tokenizer import Tokenizer

Openers = tuple[Callable[[], Sequence[Share]], Callable[[], Tokenizer]]
Rows = dict[int, tuple[PackedSequence, LaneState]]

STEPS_AHEAD = 8
"""Steps that wait in a worker; enough for a document that takes as long as several steps."""


def steps(
    openers: Openers,
    settings: PackingSettings,
    own: list[int],
    n_lanes: int,
    states: list[LaneState],
) -> Iterator[Rows]:
    """For each step: every own lane's row and the lane's state behind it."""
    mixture, tokenizer = openers[0](), openers[1]()
    lanes = [Lane(mixture, tokenizer, settings, lane, n_lanes, states[lane]) for lane in own]
    while True:
        yield {lane.lane: (lane.next_sequence(), lane.state) for lane in lanes}


def work(
    connection: Connection,
    openers: Openers,
    settings: PackingSettings,
    own: list[int],
    n_lanes: int,
    states: list[LaneState],
) -> None:
    """The body of a worker process; ends with its parent. An error is sent, not lost."""
    ready: queue.Queue[Rows | Exception] = queue.Queue(STEPS_AHEAD)
    sender = threading.Thread(target=_send, args=(connection, ready), daemon=True)
    sender.start()
    try:
        for rows in steps(openers, settings, own, n_lanes, states):
            ready.put(rows)
    except (ValueError, OSError) as error:
        ready.put(error)
        sender.join()


def _send(connection: Connection, ready: queue.Queue[Rows | Exception]) -> None:
    """Send what is ready; end the process as soon as nobody can receive it any more."""
    while True:
        message = ready.get()
        try:
            connection.send(message)
        except OSError:  # the parent is gone, however it ended
            os._exit(1)
        if isinstance(message, Exception):
            return
