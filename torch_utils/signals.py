"""Signals as requests (finish the step, save, leave) or held back, and a watchdog for steps that never end."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time

# Exit codes of train.py besides 0 (done), 1 (an error, named in a sentence) and 2 (options that click refuses).
EXIT_HUNG = 70  # EX_SOFTWARE of sysexits.h: a rank made no progress
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal, the state is saved; the same command with --auto-resume continues

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SECOND_SIGNAL_SEC = 1.0  # Ctrl-C reaches a rank twice at once, from the terminal and from torchrun; that is one request


class StopRequest:
    """Context in which the first of STOP_SIGNALS only sets `name`; SIGHUP, a closed terminal, unless nohup ignores it.

    Another one more than SECOND_SIGNAL_SEC later ends the process, with code 128 + its number. A thread reads the
    signals, so this works even while the main thread waits inside PyTorch for a lost rank. Outside the main thread no
    handlers are installed.

    Attributes:
        name: Name of the first signal, such as 'SIGTERM'; None before.
    """

    def __init__(self):
        self.name = None
        self._thread = None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._reader, self._pipe = os.pipe()
            os.set_blocking(self._pipe, False)
            self._former_pipe = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
            ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
            self._former = {number: signal.signal(number, lambda *_: None) for number in {*STOP_SIGNALS} - ignored}
            self._thread = threading.Thread(target=self._watch, name='signals', daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc):
        if self._thread is not None:
            for number, handler in self._former.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._former_pipe)
            os.close(self._pipe)  # the reader sees the end of the pipe
            self._thread.join()
            os.close(self._reader)
            self._thread = None

    def _watch(self):
        """Read the numbers that Python's own handler writes into the pipe, until it is closed."""
        first = None
        while byte := os.read(self._reader, 1):
            number = byte[0]
            if number not in STOP_SIGNALS:
                continue
            if first is None:
                first, self.name = time.monotonic(), signal.Signals(number).name
            elif time.monotonic() > first + SECOND_SIGNAL_SEC:
                os._exit(128 + number)


def shield_worker():
    """For data-loader workers: ignore signals to the whole process group; the rank handles them and ends its workers.

    They still end when the rank itself terminates them, and PyTorch ends them when the rank is gone.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS, where SIGTERM keeps PyTorch's handler
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=[os.getppid()], daemon=True).start()


def _end_with_parent(parent):
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class Watchdog:
    """Ends this process with EXIT_HUNG and a stack trace if no `beat` follows another within `seconds`.

    Every rank has one: a rank that hangs ends, and so do those that wait for it, so no job hangs silently for ever.
    Time during which the whole process is suspended does not count.

    Args:
        seconds: 0 switches it off.
        who: Name of this rank for the message.
    """

    def __init__(self, seconds, who='this process'):
        self.seconds, self.who = seconds, who
        self._idle, self._resting = 0.0, True
        self._closed = threading.Event()

    def __enter__(self):
        if self.seconds:
            threading.Thread(target=self._watch, name='watchdog', daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._closed.set()

    def beat(self):
        """Something is done: restart the clock."""
        self._idle, self._resting = 0.0, False

    def rest(self):
        """Stop the clock until the next `beat`: work of any length follows."""
        self._resting = True

    def _watch(self):
        period = min(self.seconds / 4, 1.0)
        while not self._closed.wait(period):
            self._idle += period
            if not self._resting and self._idle > self.seconds:
                self._end()

    def _end(self):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # there is none, or it is gone or closed
            sys.__stderr__.write(f'\nError: {self.who} made no progress for {self.seconds:g} seconds: it hangs, or '
                                 'waits for a rank that hangs or is lost; if its steps just take longer, allow more '
                                 'with --timeout. Stack trace:\n')
            sys.__stderr__.flush()
            faulthandler.dump_traceback(sys.__stderr__)
        os._exit(EXIT_HUNG)


@contextlib.contextmanager
def defer_signals():
    """Context that holds Ctrl-C and SIGTERM back until the block ends: a pool that is interrupted may wait for ever."""
    with _defer_interrupts(), defer_signal(signal.SIGTERM):
        yield


@contextlib.contextmanager
def _defer_interrupts():
    """Ctrl-C by the mask, which processes that are started in it inherit: they never see it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def defer_signal(number):
    """Context that holds a signal back by its handler, which processes started in it do not inherit.

    Only the main thread can set handlers; in others it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived = []
    handler = signal.signal(number, lambda *_: arrived.append(True))
    try:
        yield
    finally:
        signal.signal(number, handler or signal.SIG_DFL)
        if arrived:
            signal.raise_signal(number)
