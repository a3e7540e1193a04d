"""mixerbench: controlled ablations of sequence mixers, in which only the mixer varies."""


class Refusal(Exception):
    """An input that the user can mend. The command line prints it as one line and exits with 2."""


class NotInstalled(Refusal):
    """An optional package that is not there: what can do without it goes on."""
