"""Lightning callbacks, imported as ``lowrank_lit.callbacks``."""

if __name__ != "lowrank_lit.callbacks":
    raise ModuleNotFoundError(
        "The repository's callbacks/ directory is the source of `lowrank_lit.callbacks`; import it under that name."
    )

from lowrank_lit.callbacks.compression import LowRankCompression
from lowrank_lit.callbacks.export import ExportOnFitEnd
from lowrank_lit.callbacks.memory import MemoryReport
from lowrank_lit.callbacks.reallocation import RankReallocation
from lowrank_lit.callbacks.recovery import FactorTuning, RankPreservingLoRA
from lowrank_lit.callbacks.refinement import Refinement
from lowrank_lit.callbacks.report import RankReport
from lowrank_lit.callbacks.resume import ExactResume

__all__ = [
    "ExactResume",
    "ExportOnFitEnd",
    "FactorTuning",
    "LowRankCompression",
    "MemoryReport",
    "RankPreservingLoRA",
    "RankReallocation",
    "RankReport",
    "Refinement",
]
