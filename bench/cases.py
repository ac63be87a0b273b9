"""The list of workloads: shapes, tasks and training lengths, each with a name."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import product

from . import UserError

CELLS = ("lstm", "gru")
EVERY_CELL = (*CELLS, "rnn")


@dataclass(frozen=True)
class Workload:
    """The shape of an RNN, its task, and how long it is trained."""

    name: str  # unique
    group: str
    task: str  # reviews: one-hot, embedding; series: sine, price; none: random input, not trained
    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    ragged: bool = False  # the input is a PackedSequence
    dropout: float = 0.0
    dtype: str = "float32"
    cells: tuple[str, ...] = EVERY_CELL
    vocabulary: int = 0
    train: int = 0  # reviews; a series is split 4 to 1 in order of time
    test: int = 0
    steps: int = 0  # of the optimiser, on the CPU
    gpu_steps: int = 0
    learning_rate: float = 1e-2

    @property
    def shape(self) -> str:
        """The sizes in short, as ``T100 B64 I300 H16x2bi``."""
        layers = f"x{self.layers}" if self.layers > 1 else ""
        return f"T{self.T} B{self.B} I{self.I} H{self.H}{layers}{'bi' * self.bidirectional}"


ONE_HOT = Workload(
    "imdb-one-hot", "imdb", "one-hot", T=100, B=64, I=300, H=16, vocabulary=300,
    train=15_000, test=10_000, steps=235, gpu_steps=1410,
)  # fmt: skip
#: Two steps on the CPU show that the curves are equal; they do not make a classifier.
EMBEDDING = Workload(
    "imdb-embedding", "imdb", "embedding", T=200, B=64, I=64, H=128, layers=2, bidirectional=True,
    ragged=True, dropout=0.3, vocabulary=20_000, train=15_000, test=256, steps=2, gpu_steps=300,
    learning_rate=2e-3,
)  # fmt: skip
SINE = tuple(
    Workload(f"sine-{T}", "sine", "sine", T=T, B=32, I=1, H=32, steps=100, gpu_steps=600)
    for T in (20, 10, 30, 50, 100)
)
PRICE = replace(SINE[2], name="price-30", task="price", H=50, layers=2, dropout=0.2)
TRAINED = (ONE_HOT, EMBEDDING, *SINE, PRICE)
#: A single step of a character model.
CHARACTER = Workload("character", "toy", "none", T=1, B=1, I=32, H=128)
LESSONS = (
    Workload("many-to-one", "toy", "none", T=4, B=2, I=1, H=5),
    Workload("toy-both-ways", "toy", "none", T=10, B=16, I=32, H=64, bidirectional=True),
    *TRAINED,
    CHARACTER,
)
#: The least that must work on a GPU.
FIRST = Workload("first", "toy", "none", T=20, B=16, I=64, H=128)
LONG = Workload("long", "toy", "none", T=500, B=16, I=64, H=64)
RAGGED = Workload("ragged", "ragged", "none", T=500, B=32, I=128, H=128, ragged=True)


#: Sizes that others have published times of (``bench/references.csv``).
PUBLISHED = (
    *(
        Workload(f"kernelbench-{n}", "kernelbench", "none", 512, 10, 128, 256, 6, D, cells=(cell,))
        for n, cell, D in (
            (35, "lstm", False), (38, "lstm", True), (39, "gru", False), (41, "gru", True),
        )
    ),
    *(
        Workload(f"deepbench-{cell}-{H}", "deepbench", "none", T, B, H, H, cells=(cell,))
        for cell, H, B, T in (
            ("lstm", 256, 16, 150), ("lstm", 512, 16, 25), ("lstm", 1024, 32, 25),
            ("lstm", 1536, 16, 50), ("gru", 1024, 32, 1500), ("gru", 1536, 32, 375),
        )
    ),
)  # fmt: skip


def sweep() -> Iterator[Workload]:
    """Yields sizes, batches, dtypes, lengths and kinds; the usual ones first."""
    kinds: dict[str, dict] = {
        "": {}, "-packed": {"ragged": True}, "-bidirectional": {"bidirectional": True},
        "-stacked": {"layers": 2},
    }  # fmt: skip
    sizes = (64, 256, 1024, 128, 512, 32, 16, 192, 384, 768, 2048)
    dtypes = {"fp16": "float16", "fp32": "float32", "bf16": "bfloat16"}
    lengths, batches = (512, 64, 1024, 256, 4096), (16, 64, 1, 128, 256)
    for T, kind, B, H, dtype in product(lengths, kinds, batches, sizes, dtypes):
        if T * B * H <= 2**28:  # or it does not fit into memory
            name = f"H{H}-B{B}-{dtype}{'' if T == 512 else f'-T{T}'}{kind}"
            point = Workload(name, "sweep", "none", T, B, H, H, dtype=dtypes[dtype], cells=CELLS)
            yield replace(point, **kinds[kind])


def every_case() -> tuple[Workload, ...]:
    return (*LESSONS, FIRST, LONG, RAGGED, *PUBLISHED, *sweep())


def named(names: str) -> tuple[Workload, ...]:
    """Returns the workloads of a list of names of cases, groups or ``lessons``, with commas."""
    by_name = {"lessons": LESSONS}
    for workload in every_case():
        for name in (workload.group, workload.name):
            by_name[name] = (*by_name.get(name, ()), workload)
    workloads: dict[Workload, None] = {}  # an ordered set
    for name in names.split(","):
        if name not in by_name:
            near = get_close_matches(name, by_name, n=4, cutoff=0.5)
            hint = f"similar names are {', '.join(near)}" if near else "`cases` alone lists all"
            raise UserError(f"there is no case {name!r}; {hint}")
        workloads |= dict.fromkeys(by_name[name])
    return tuple(workloads)


def cut_down(workload: Workload) -> Workload:
    """Returns the same task in sizes that test the program and measure nothing."""
    most = {"T": 12, "B": 4, "H": 8, "vocabulary": 300, "train": 64, "test": 32, "steps": 3,
            "gpu_steps": 3, "layers": 2}  # fmt: skip
    return replace(workload, **{name: min(getattr(workload, name), n) for name, n in most.items()})
