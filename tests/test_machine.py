"""Claims about machine.py: devices, dtypes, threads, signals."""
import math
import os
import signal

import pytest
import torch

from common import ids, toy
import machine


class TwoCores:
    """A machine and its clock: a step takes 1 s, but 40 s with two threads while another program keeps a core busy."""

    def __init__(self, busy):
        self.now, self.busy, self.looks = 0.0, busy, 0

    def rate(self, threads):
        self.now, self.looks = self.now + 0.05, self.looks + 1
        return {1: 55.0, 2: 2.0 if self.busy else 100.0}[threads]

    def threads(self, fixed=None):
        return machine.Threads(fixed, clock=lambda: self.now, rate=self.rate)

    def steps(self, threads, n):
        """Seconds of each of n steps."""
        taken = []
        for _ in range(n):
            taken.append(1.8 if threads.threads == 1 else 40.0 if self.busy else 1.0)
            self.now += taken[-1]
            threads.watch(taken[-1])
        return taken


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_give_way_to_another_program_and_come_back(two_threads, capsys):
    here = TwoCores(busy=False)
    with here.threads() as threads:
        assert here.looks == 2 and here.steps(threads, 50) == [1.0] * 50
        assert here.looks == 4, "a quiet machine is looked at before a step and after"
        threads.watch(9.0)                        # a disk that stalls: two threads still do more than one
        assert here.looks == 6 and threads.threads == 2
        here.now, here.busy = here.now + 100, True
        assert here.steps(threads, 3) == [40.0, 1.8, 1.8] and torch.get_num_threads() == 1, "one slow step is enough"
        looks = here.looks
        here.steps(threads, 100)
        assert (here.looks - looks) * 0.05 < 0.03 * 180, "looking again costs little"
        here.busy = False
        assert here.steps(threads, 10)[-1] == 1.0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "1 of 2 threads" in said[0] and "free again" in said[1]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("busy_before, fixed, seconds", [
    (True, None, [1.8, 1.8]), (False, None, [40.0, 1.8]), (True, 2, [40.0, 40.0]), (False, 1, [1.8, 1.8])])
def test_a_machine_busy_from_the_start_is_seen_and_a_fixed_number_stays(two_threads, busy_before, fixed, seconds):
    here = TwoCores(busy_before)
    with here.threads(fixed) as threads:
        here.busy = True                          # at the latest now, before any step was quick
        assert here.steps(threads, 2) == seconds and torch.get_num_threads() == threads.threads
    assert torch.get_num_threads() == 2


def test_the_number_of_threads_is_part_of_what_a_run_repeats(two_threads):
    """The same number, the same bits; another one may change them, which is why --threads=N exists."""
    gradients = []
    for threads in (2, 2, 1):
        with machine.Threads(threads):
            model = toy("plain", d_model=128, d_ff=512)
            model(ids(16, 24), ids(16, 24, seed=2))[1].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, gradients[0], gradients[1]))
    for one, two in zip(gradients[2], gradients[0]):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-3)     # the order of float32 sums


def test_devices_and_dtypes(monkeypatch):
    assert 1e8 < machine.matmul_flops(torch.float32, size=128) < math.inf
    assert 1e6 < machine.thread_rate(1, 0.01) * 2 ** 19 < 1e14
    with pytest.raises(ValueError, match="cuda:99.*try --device=cpu"):
        machine.pick_device("cuda:99")
    assert machine.pick_device("cpu") == "cpu" and machine.pick_dtype("float16", "cpu") == "float16"
    rates = {torch.bfloat16: 4.0, torch.float32: 1.0}
    monkeypatch.setattr(machine, "matmul_flops", lambda dtype, *_: rates[dtype])
    assert machine.pick_dtype(None, "cpu") == "bfloat16"
    rates[torch.bfloat16] = 1.2
    assert machine.pick_dtype(None, "cpu") == "float32" and machine.pick_dtype(None, "mps") == "float32"
    assert machine.peak_flops("mps", "float32") is None and machine.peak_flops("cpu", "float32") == 1.0


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_the_first_signal_is_remembered_and_the_second_acts(request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)       # a shell's background job starts without
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with machine.Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1) if hasattr(signal, "sigtimedwait") else None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
