"""How many steps fit in a time that is given."""

__all__ = ["Clock"]

FIRST = 10  # steps before the speed is believed; the very first ones are slower
AGAIN = 1.1  # the number of steps is settled again when the run is longer by this factor


class Clock:
    """The length of a run that shall take a time.

    Args:
        budget: seconds of training in all.
        step, seconds: what was done before this process, and how long that took.
    """

    def __init__(self, budget: float, step: int, seconds: float):
        self.budget, self.start, self.before = budget, step, seconds
        self.next = step + FIRST

    def steps(self, step: int, seconds: float) -> int | None:
        """How many steps the run shall have, at least those done and one; None where that stays as it was.

        Args:
            step, seconds: what is done by now, and how long that took in all.
        """
        if step < self.next:
            return None
        done = step - self.start
        self.next = self.start + int(done * AGAIN) + 1
        each = (seconds - self.before) / done
        return max(step + 1, step + int((self.budget - seconds) / each)) if each > 0 else None
