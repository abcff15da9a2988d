"""What was asked for latest, kept for the next time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class Latest:
    """The values of the latest keys, for any thread; two threads may compute one value at the same time."""

    def __init__(self, count: int) -> None:
        self.count, self.values, self.lock = count, OrderedDict(), threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of `key`, made if it is not there."""
        with self.lock:
            if key in self.values:
                self.values.move_to_end(key)
                return self.values[key]
        value = make()
        with self.lock:
            self.values[key] = value
            while len(self.values) > self.count:
                self.values.popitem(last=False)
        return value
