"""What workers raise to say more than that something failed. Loads nothing, so that every role can import it."""


class BrokenWorkerError(RuntimeError):
    """The worker cannot serve any more (its engine died, or holds half of an update): replace it."""


class ResponsesLostError(RuntimeError):
    """A worker gave responses up, and is well: they can be sampled again, by it too."""
