"""How well predicted losses rank plans, and whether cosines of modules follow effective ranks; Markdown tables.

    LOWRANK_LIT_REFERENCE=FOLDER python benchmarks/prediction.py --bench runs/bench

Plans: 20 random ones of one budget (keep ratio 0.7): the knapsack on curves multiplied by random factors, log-normal
with deviation 1, one per matrix. Predicted: half the dropped squared singular values of two_sided; with statistics of
the dense model, the same times the module importance, and that with statistics of the model compressed by the plan
without noise (what the second round of `best` ranks by). Measured: rise of the loss on the first 50 test blocks.
Correlations are Spearman's.
"""

from __future__ import annotations

import argparse
import math
import warnings
from dataclasses import replace

import numpy as np
import torch
from grid import Bench, problems

from lowrank_lit import perplexity
from lowrank_lit.allocation import MatrixProfile, MatrixSpec, allocate, predicted_loss
from lowrank_lit.collection import Evidence
from lowrank_lit.diagnosis import spearman
from lowrank_lit.evidence import profiles_of, specs_of
from lowrank_lit.refit import substituted
from lowrank_lit.settings import Settings
from lowrank_lit.spectrum import effective_rank
from lowrank_lit.study import Study


def profiles_in(study: Study, specs: list[MatrixSpec], evidence: Evidence, power: float) -> list[MatrixProfile]:
    """Curves in nats, times a power of the module importance."""
    places = study.collection.places
    return profiles_of(specs, evidence.spectra, evidence.calibration, places, metric="two_sided", power=power)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", default=None)
    parser.add_argument("--models", default="")
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    print(
        "| model | plans: dense | x importance | compressed, x importance | predicted, nats | measured, nats | ", end=""
    )
    print("cosine against effective rank: identity | input | two_sided |\n|---|---|---|---|---|---|---|---|---|")
    for name, folder, sources, _ in problems(options.bench, options.models):
        bench = Bench(name, folder, sources, None, 0, "test")
        study, settings = bench.study, Settings(0.7, preset="fast", select=False)
        specs = specs_of(study.targets, settings)
        _, evidence, _ = study.collection.first(settings)
        collection = study.collection
        profiles = profiles_in(study, specs, evidence, 0.0)
        centre = collection.weights(specs, evidence.spectra, allocate(profiles, allocator="knapsack", keep_ratio=0.7))
        compressed = collection.recollected(settings, centre, 1.0)
        known = replace(compressed.calibration, importance=evidence.calibration.importance)
        compressed = replace(compressed, calibration=known)
        others = [profiles_in(study, specs, found, 1.0) for found in (evidence, compressed)]
        draw = np.random.default_rng(0)
        blocks = bench.blocks["test"][:50]
        dense = math.log(perplexity(bench.model, blocks))
        predicted, measured = [], []
        weighted: list[list[float]] = [[] for _ in others]
        for _ in range(options.plans):
            noisy = [replace(entry, nats=entry.nats * math.exp(draw.normal())) for entry in profiles]
            ranks = allocate(noisy, allocator="knapsack", keep_ratio=0.7)
            predicted.append(predicted_loss(profiles, ranks))
            for values, other in zip(weighted, others, strict=True):
                values.append(predicted_loss(other, ranks))
            weights = collection.weights(specs, evidence.spectra, ranks)
            with substituted(study.layers, weights):
                measured.append(math.log(perplexity(bench.model, blocks)) - dense)
        cells = []
        for metric in ("identity", "input", "two_sided"):
            _, found, _ = collection.first(replace(settings, metric=metric))
            share = [effective_rank(found.spectra[spec.name].energy()) / spec.full_rank for spec in specs]
            cosine = [1 - evidence.calibration.importance[spec.name] for spec in specs]
            cells.append(f"{spearman(cosine, share):+.2f}")
        print(
            f"| {name} | {' | '.join(f'{spearman(values, measured):.2f}' for values in (predicted, *weighted))} | "
            f"{min(predicted):.3f} to {max(predicted):.3f} | "
            f"{min(measured):.3f} to {max(measured):.3f} | " + " | ".join(cells) + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
