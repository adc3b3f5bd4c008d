# Tells a leak from a tap: water that is used in every single period of a day.

PERIODS = 96  # a day of quarter hours


class LeakWatch:
    def __init__(self, periods=PERIODS):
        self.periods = periods
        self.wet = 0
        self.least = 0

    def add(self, litres):
        """Takes the litres of one period; returns litres a period lost, or 0."""
        if litres == 0:
            self.wet = 0
            self.least = 0
            return 0
        self.least = litres if self.wet == 0 else min(self.least, litres)
        self.wet += 1
        return self.least if self.wet >= self.periods else 0
