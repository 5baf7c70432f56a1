"""Run a tiny pipeline in several processes of this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("ulysses_worker.py")
TIMEOUT = 300  # seconds: two imports of diffusers on a busy machine


def results_of(folder: Path, rank: int) -> list[dict]:
    """What one rank left: its report of each run, and the latents."""
    latents = load_file(folder / f"rank{rank}.safetensors")
    results = json.loads((folder / f"rank{rank}.json").read_text())
    return [{**result, "latents": latents[str(i)]} for i, result in enumerate(results)]


@pytest.fixture
def run_ulysses(tmp_path):
    """A function that runs a case under Ulysses context parallelism: per rank, one result per recipe."""

    def run(case, recipes=(None,), order="accelerate first", text_tokens=None, ranks=2, **call):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        names = {"case": case, "recipes": recipes, "order": order, "text_tokens": text_tokens, "ranks": ranks}
        job = folder / "job.json"
        job.write_text(json.dumps(names | {"call": call}))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(job), str(rank)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            logs = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for rank, (process, log) in enumerate(zip(processes, logs, strict=True)):
            assert process.returncode == 0, f"rank {rank} failed:\n{log}"
        return [results_of(folder, rank) for rank in range(ranks)]

    return run
