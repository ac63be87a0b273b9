"""The timings of an SM of each architecture, with the source of every figure.

Letters in the comments name the sources:

A  Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via
   Microbenchmarking", arXiv 2402.13499, and arXiv 2501.12084 (A100, RTX 4090, H800).
B  Abdelkhalik et al., "Demystifying the Nvidia Ampere Architecture through Microbenchmarking and
   Instruction-level Analysis", arXiv 2208.11174.
C  Sun et al., "Dissecting Tensor Cores via Microbenchmarks", arXiv 2206.02874.
D  Huerta et al., "Analyzing Modern NVIDIA GPU cores", arXiv 2503.20481 (RTX A6000).
E  Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", 1804.06826.
F  Zhang et al., "A Study of Single and Multi-device Synchronization Methods in Nvidia GPUs",
   IPDPS 2020 (barrier of a block on a V100: 22 cycles, 0.475 warps a cycle).
G  NVIDIA, "CUDA C++ Programming Guide", arithmetic throughput by compute capability, and the white
   papers of each architecture (lanes, load/store units, peak of the tensor cores, clock).
H  The stall counts in binaries that ``ptxas`` makes for the architecture.
X  Assumed: no source was found. ``docs/predicted.md`` shows what depends on the doubtful ones.
"""

from typing import NamedTuple


class Timings(NamedTuple):
    """Cycles, unless the comment names another unit. A sub-core is one of an SM's four schedulers.

    *busy*: how long one instruction of a warp occupies a pipe of its sub-core.
    *latency*: from issue to the first use of the result.
    """

    mhz: float  # the clock, where torch does not name that of the chip
    sms: int
    shared: int  # the most bytes of one program
    fma_pipes: int = 2  # of 16 lanes, but one on sm_80 (G)
    fma: float = 2.0  # busy; FADD, FMUL, FFMA and their 16-bit forms in one of the pipes (G)
    imad: float = 2.0  # busy; integer multiply-add, in the first of the pipes (D, G)
    alu: float = 2.0  # busy; integer, logic, compare, select, pack on 16 lanes (G)
    uniform: float = 2.0  # busy; the uniform datapath (X)
    branch: float = 12.0  # from a taken branch to the first instruction at its target (X; E: ~10)
    mufu: float = 8.0  # busy; 16 lanes an SM, conversions included (G)
    mufu_latency: float = 22.0  # (B: 18 to 23 with a move)
    #: busy; HMMA.16816 of 16-bit operands, or HMMA.1688 of tf32: half the products (C, G)
    hmma: float = 8.0
    hmma_latency: float = 24.6  # accumulator to accumulator (A, C)
    address: float = 4.0  # busy; the address unit of a sub-core has 8 lanes (D, G, H)
    queue: int = 6  # memory instructions between issue and address unit (D: 5)
    shared_bytes: float = 128.0  # bytes a cycle and SM (G)
    global_bytes: float = 64.0  # bytes a cycle and SM through L1 (G)
    lds_latency: float = 26.0  # (D: 24; C: 23; A: 29 in a chain of pointers)
    ldsm_latency: float = 29.0  # one matrix; each further one adds a beat (C: 23 to 29)
    sts_read: float = 12.0  # until a shared store has read its registers (D: 12 to 18)
    shuffle_latency: float = 24.0  # (B, E)
    l1: float = 40.0  # latency of a global load (A: 38 to 41)
    l2: float = 270.0  # (A: mean 263, 200 near to 414 far)
    constant_latency: float = 29.0  # LDC (D)
    special_latency: float = 25.0  # S2R (X)
    r2ur_latency: float = 10.0  # (X)
    barrier: float = 20.0  # from the last arrival to the next instruction (F)
    arrive: float = 2.0  # busy; the arrival of one warp (F)
    hop_us: float = 0.65  # microseconds; from a releasing store to an acquiring load (X)


#: Only sm_90 was compared with measurements. Peaks of GeForce chips with 32-bit accumulators: 64
#: products a cycle and sub-core, a quarter of an A100's.
TIMINGS = {
    "sm_80": Timings(1410.0, 108, 166_912, fma_pipes=1, l2=262.0),  # A100
    "sm_86": Timings(1695.0, 84, 101_376, hmma=32.0),  # RTX 3090, SMs of an A40
    "sm_89": Timings(2520.0, 142, 101_376, hmma=32.0, l2=280.0),  # RTX 4090, SMs of an L40
    # H100 SXM: mma.sync reaches 63 % of the peak, 6.5 cycles for 4 (A); 6 or 7 apart by ptxas (H).
    "sm_90": Timings(1755.0, 132, 232_448, hmma=6.5, hmma_latency=24.1),
    # No figures were found: those of sm_90 at the clock of a B200 (X).
    "sm_100": Timings(1965.0, 148, 232_448, hmma=6.5, hmma_latency=24.1),
    "sm_120": Timings(2407.0, 170, 101_376, hmma=32.0, l2=300.0),  # RTX 5090
}
