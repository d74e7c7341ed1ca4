"""A signal is not lost, whenever it comes."""

import os
import signal

from crystal.training.guards import Interrupts


def test_a_signal_that_comes_while_the_processes_meet_is_not_lost():
    with Interrupts(lambda: None) as interrupts:
        before = interrupts.received
        os.kill(os.getpid(), signal.SIGUSR1)  # in the middle of the exchange: this process has told that it has none
        assert interrupts.agreed(before) == 0
        assert interrupts.agreed(interrupts.received) == signal.SIGUSR1
        assert interrupts.received == signal.SIGUSR1


def test_the_signal_of_another_process_counts_as_this_ones():
    with Interrupts(lambda: None) as interrupts:
        assert interrupts.agreed(signal.SIGTERM) == signal.SIGTERM
        assert interrupts.received == signal.SIGTERM


def test_the_handlers_are_what_they_were_before():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    with Interrupts(lambda: None):
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before
