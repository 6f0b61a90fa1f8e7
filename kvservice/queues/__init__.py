"""queues: the engines' waiting queues, as they report them, merged into one order.

Covers: keeping each queue in step with its engine though messages are lost, repeated or overtake
each other; bounds; the order across instances. Does not cover: what is done about it (`lookahead`,
`policies`). Pure: time is an argument.
"""

from kvservice.queues.merged import Applied, Arranged, MergedQueues
from kvservice.queues.updates import Bounds, Entry, Moved, QueueDelta, QueueSnapshot, QueueUpdate, UpdateOutcome
from kvservice.queues.waiting import QueuedRequest, WaitingQueue

__all__ = [
    "Applied",
    "Arranged",
    "Bounds",
    "Entry",
    "MergedQueues",
    "Moved",
    "QueueDelta",
    "QueueSnapshot",
    "QueueUpdate",
    "QueuedRequest",
    "UpdateOutcome",
    "WaitingQueue",
]
