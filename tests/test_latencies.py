"""The timings of each chip are complete, have sources, and make up the published peaks."""

import inspect
import math
import re

import pytest
from compiling import COMPILED_CHIPS

from fusedrnn.kernels import expected, latencies
from fusedrnn.kernels.expected import flops_a_cycle
from fusedrnn.kernels.latencies import TIMINGS

#: KiB of shared memory of a program; SMs, MHz, and TFLOP/s of dense 16-bit products (sums in fp32)
#: and of fp32, as NVIDIA's guide and white papers have them. `mma.sync` reaches 63 % on sm_90.
PUBLISHED = {
    "sm_80": (163, 108, 1410, 312, 19.5), "sm_86": (99, 82, 1695, 71, 35.6),
    "sm_89": (99, 128, 2520, 165.2, 82.6), "sm_90": (227, 132, 1830, 0.63 * 989.4, 61.8),
    "sm_120": (99, 170, 2407, 209.5, 104.8),
}  # fmt: skip


def test_every_chip_has_all_timings():
    assert set(COMPILED_CHIPS) == TIMINGS.keys() == PUBLISHED.keys() | {"sm_100"}
    assert {expected.FAMILIES.get(arch, "sm_90") for arch in TIMINGS} <= TIMINGS.keys()
    for timings in TIMINGS.values():
        assert all(0 < value < math.inf for value in timings)
        assert timings.lds_latency < timings.l1 < timings.l2 < timings.hop_us * timings.mhz


@pytest.mark.parametrize("arch", PUBLISHED)
def test_the_peaks_are_the_published_ones(arch):
    sm, (kib, sms, mhz, *peaks) = TIMINGS[arch], PUBLISHED[arch]
    assert sm.shared == kib * 1024
    assert abs(sm.mhz / mhz - 1) < 0.05
    found = [flops_a_cycle(kind, sm) * sms * mhz / 1e6 for kind in ("16-bit", "ieee")]
    assert found == pytest.approx(peaks, rel=0.03)


def test_every_figure_names_its_sources():
    text = inspect.getsource(latencies)
    known = set(re.findall(r"^([A-Z])  ", text, re.MULTILINE))
    fields = re.findall(r"^((?:    #:.*\n)?    (\w+): \w+ = .*)", text, re.MULTILINE)
    named = {name: set(re.findall(r"\b([A-Z])\b(?=[:;,)])", line)) for line, name in fields}
    assert named.keys() == latencies.Timings._field_defaults.keys()
    assert all(named.values())
    assert set().union(*named.values()) == known
