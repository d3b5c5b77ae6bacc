"""A pipeline with expert parallelism, for test_pipeline_mpi.py: ``mpi_pipeline.py FOLDER sim|mpi``.

Every process writes the SHA-256 of the gradients it ends up with, by name, and the losses, to FOLDER/<first rank>.json.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from minidsv3.config import ModelConfig
from minidsv3.model.stages import cut
from minidsv3.model.transformer import Transformer
from minidsv3.parallel.comm import SimCommunicator
from minidsv3.parallel.pipeline import GroupedDispatcher, run
from minidsv3.parallel.ranks import Ranks
from minidsv3.parallel.schedules import build

# name of the schedule, pipeline ranks, ranks that share the experts, chunks; on four processes or less
LAYOUTS = (("dualpipe", 4, 1, 8), ("1f1b", 2, 2, 3), ("dualpipe", 2, 2, 4), ("dualpipe", 4, 4, 8))


def digests(comm, name, ranks, replicas, chunks):
    """Gradients of one run, by name; those of weights that this process does not hold are left out."""
    hosts, rng = Ranks(comm, timeout=60.0), np.random.default_rng(1)
    dispatcher = GroupedDispatcher(hosts, 16, replicas) if replicas > 1 else None
    model = Transformer(ModelConfig.preset("nano"), dispatcher=dispatcher)
    model.init_weights(np.random.default_rng(0), np.float64)
    batches = [tuple(rng.integers(0, 257, (1, 7)) for _ in range(2)) for _ in range(chunks * replicas)]
    schedule = build(name, ranks, chunks)
    result = run(schedule, cut(model, schedule.stages), [(x, y, x) for x, y in batches], hosts, replicas)
    found = {n: hashlib.sha256(p.grad.tobytes()).hexdigest() for n, p in model.named_parameters() if p.grad.any()}
    return {"losses": result.losses, "peak_live": result.peak_live, "gradients": found}


def main(folder, engine):
    def communicator(ranks):
        if engine == "sim":
            return SimCommunicator(ranks)
        from minidsv3.parallel.mpi import MPICommunicator

        return MPICommunicator(ranks, timeout=60.0)

    found = [digests(communicator(ranks * replicas), name, ranks, replicas, chunks)
             for name, ranks, replicas, chunks in LAYOUTS]  # fmt: skip
    first = communicator(4).local_ranks[0]
    (Path(folder) / f"{first}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
