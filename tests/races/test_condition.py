"""The condition's reader (PTX) and a host that writes ``arrivals`` at any time: no race.

Every load of the PTX is an access of one program; the host is another. What earlier launches and
copies have written is ordered by the stream, so only what the host writes meanwhile counts.
"""

from __future__ import annotations

import re
from importlib.util import find_spec

import numpy as np
import pytest

if find_spec("triton") is None:
    pytest.skip("there is no Triton for this platform", allow_module_level=True)

from races.happens_before import Race, Trace
from races.interpreter import Access, Site

from fusedstep.kernels.condition import PTX

OFFSETS = {"num_active": 0, "arrivals": 128, "seen": 256}
HOST, DEVICE = range(2)


def races(ptx: str) -> list[Race]:
    """Of one run, whose host writes before the device reads."""
    trace = Trace(2, scopes=("sys",))
    site = Site("host", 0, "arrivals += 1", uses_value=False)
    address = np.array([OFFSETS["arrivals"]])
    # The host writes eight aligned bytes at once.
    host = Access(HOST, "atomic", address, 8, True, site, "relaxed", "sys")
    trace.access(host, None)
    for access in loads(ptx):
        trace.access(access, None)
    return [race for race, _ in trace.races()]


def loads(ptx: str) -> list[Access]:
    """Its loads of what its parameters point to, in order."""
    pointers = dict(re.findall(r"ld\.param\.u64 (%rd\d), \[(\w+)\]", ptx))
    found = []
    for number, text in enumerate(ptx.splitlines(), 1):
        if match := re.fullmatch(r"ld\.(\S+)\.s(\d+) %\w+, \[(%rd\d)\];", text.strip()):
            order, bits, register = match.groups()
            name = pointers[register]
            site = Site("condition.py", number, text.strip(), uses_value=True)
            address, size = np.array([OFFSETS[name]]), int(bits) // 8
            strong = re.fullmatch(r"(relaxed|acquire)\.(\w+)", order)
            kind, sem, scope = ("atomic", *strong.groups()) if strong else ("load", "", "")
            found.append(Access(DEVICE, kind, address, size, True, site, sem, scope))
    return found


def test_no_race_with_the_host() -> None:
    assert len(loads(PTX)) == len(OFFSETS)
    assert not races(PTX)


@pytest.mark.parametrize("load", ["ld.global.s64", "ld.relaxed.gpu.s64", "ld.relaxed.cta.s64"])
def test_weaker_loads_race(load: str) -> None:
    """A plain load may read a cached value, and a narrower scope leaves out the host."""
    assert PTX.count("ld.relaxed.sys.s64") == 1
    (race,) = races(PTX.replace("ld.relaxed.sys.s64", load))
    assert race.second.site.text.startswith(load)
