"""Worker processes that crash at a given moment."""

import os


def crash_at_next_request(process, signal):
    """Let a worker (`penjing.measure.processes.Process`) die of a signal when it is asked the next time.

    It dies after it was seen to be alive and before it reads the request. A process that is stopped, signalled and
    continued may still answer: another of its threads can be the one that takes the signal.
    """
    ask = process.ask

    def crashing(*request, **options):
        os.kill(process.pid, signal)
        process._exit_watch.join()
        return ask(*request, **options)

    process.ask = crashing
