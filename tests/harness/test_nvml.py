"""What is read through NVML, on a driver that is not there."""

from types import SimpleNamespace

import pytest
import torch

from harness.costs import energy


class FakeNvml:
    """A GPU that draws 200 W. supported: the calls that this driver answers."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    class NVMLError(Exception):
        pass

    def __init__(self, clock, supported):
        self.clock, self.supported = clock, supported

    def __getattr__(self, name):
        if name not in self.supported:

            def refuse(*arguments):
                raise self.NVMLError(name)

            return refuse
        answers = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
            "nvmlSystemGetDriverVersion": lambda: "999.1",
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 300_000,
            "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1410, 2: 7600}[kind],
            "nvmlDeviceGetMaxClockInfo": lambda handle, kind: {1: 2100, 2: 8001}[kind],
            "nvmlDeviceGetTotalEnergyConsumption": lambda handle: int(200_000 * self.clock.now),
        }
        return answers[name]


class Clock:
    now = 100.0

    def perf_counter(self):
        return self.now

    def run(self):
        """Half a second of work."""
        self.now += 0.5


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("harness.costs.energy.time", clock)
    return clock


def gpu(clock, *supported):
    return energy.Gpu(FakeNvml(clock, supported), "handle")


def test_energy_of_one_run(clock):
    """200 W for half a second each."""
    joules = gpu(clock, "nvmlDeviceGetTotalEnergyConsumption").joules(clock.run, seconds=2.0)
    assert joules == (pytest.approx(100), "energy counter")
    assert clock.now == pytest.approx(102), "repeated for the time that was asked for"


def test_energy_that_cannot_be_measured_is_not_made_up(clock):
    assert gpu(clock).joules(clock.run, seconds=2.0) == (None, None)
    assert clock.now == 100, "nothing is run for nothing"


def test_facts(clock):
    known = gpu(
        clock, "nvmlSystemGetDriverVersion", "nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetClockInfo"
    )
    assert known.facts() == {
        "driver": "999.1", "power_limit_w": 300, "sm_mhz": 1410, "sm_max_mhz": None, "memory_mhz": 7600,
        "memory_max_mhz": None,
    }  # fmt: skip


def test_a_cpu_has_no_nvml(clock):
    assert energy.find("cpu", FakeNvml(clock, ())) is None


def test_the_gpu_is_found_by_its_uuid(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab-cd"))
    found = energy.find("cuda:1", FakeNvml(clock, ("nvmlInit", "nvmlDeviceGetHandleByUUID")))
    assert found._handle == "GPU-ab-cd"
    assert energy.find("cuda:1", FakeNvml(clock, ("nvmlInit",))) is None, "a driver that does not know it"


def test_our_calls_exist_in_the_real_package():
    import pynvml

    for name in (
        "nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlSystemGetDriverVersion",
        "nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetClockInfo", "nvmlDeviceGetMaxClockInfo",
        "nvmlDeviceGetTotalEnergyConsumption", "NVMLError", "NVML_CLOCK_SM", "NVML_CLOCK_MEM",
    ):  # fmt: skip
        assert hasattr(pynvml, name), name
