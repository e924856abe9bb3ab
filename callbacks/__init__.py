"""Lightning callbacks, imported as ``lowrank_lit.callbacks``."""

if __name__ != "lowrank_lit.callbacks":
    raise ModuleNotFoundError(
        "The repository's callbacks/ directory is the source of `lowrank_lit.callbacks`; import it under that name."
    )

from lowrank_lit.callbacks.compression import LowRankCompression
from lowrank_lit.callbacks.export import ExportOnFitEnd
from lowrank_lit.callbacks.recovery import RankPreservingLoRA
from lowrank_lit.callbacks.report import RankReport

__all__ = ["ExportOnFitEnd", "LowRankCompression", "RankPreservingLoRA", "RankReport"]
