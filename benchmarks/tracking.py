"""What tracking costs a training, and what a server that fails costs it: figures against a real local server.

    python benchmarks/tracking.py [--steps 100000] [--outage 30]

Every case is a process of its own that logs 3 metrics a step, against `mlflow server` on SQLite. Printed are the
figures to reach, the figures that were measured, and whether they are met; the exit code is 1 where one is not.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from tracking_server import Proxy, Server

from pipeline.tracking.logger import MLflowLogger
from pipeline.tracking.replay import KEY

MOST_PER_STEP = 0.2  # milliseconds
MOST_STALL = 1.0  # seconds
METRICS = ("train/loss", "train/accuracy", "lr/head")
_MEANWHILE = 0.005  # seconds a step takes without tracking, where a server fails meanwhile


@dataclass
class Case:
    """What came out of one training.

    Attributes:
        folder: of the run.
        code: exit code.
        per_step: milliseconds that logging one step took, on average.
        stall: seconds that the slowest took.
    """

    folder: Path
    code: int
    per_step: float
    stall: float


def values(step: int) -> dict[str, float]:
    """The metrics of a step."""
    return {name: (step + 1) / (number + 3) for number, name in enumerate(METRICS)}


def train(folder: Path, uri: str, steps: int, pause: float) -> None:
    """Stands for a training: logs steps, with a pause between them, and says how long each took.

    Args:
        folder: of the run.
        uri: of the tracking server.
        steps: their number.
        pause: seconds between them, spent as a network spends them: in computing that leaves other threads alone.
    """
    logger = MLflowLogger(tracking_uri=uri, folder=folder)
    took = []
    with logger.closing():
        logger.set_tags({"kind": "benchmark"})
        for step in range(steps):
            metrics = values(step)
            began = time.perf_counter()
            logger.log_metrics(metrics, step)
            took.append(time.perf_counter() - began)
            if pause:
                time.sleep(pause)
    (folder / "took.json").write_text(json.dumps({"per_step": 1000 * statistics.fmean(took), "stall": max(took)}))


def run_case(folder: Path, uri: str, steps: int, pause: float, meanwhile: Callable[[], None] | None = None) -> Case:
    """Train in a process of its own, while something happens to the server."""
    command = [sys.executable, __file__, "--train", str(folder), uri, str(steps), str(pause)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    if meanwhile is not None:
        while not (folder / "journal.jsonl").is_file() and process.poll() is None:
            time.sleep(0.05)
        meanwhile()
    code = process.wait()
    took = json.loads((folder / "took.json").read_text())
    return Case(folder, code, took["per_step"], took["stall"])


def sync(folder: Path) -> bool:
    """Whether ``python -m pipeline sync`` could send everything."""
    done = subprocess.run([sys.executable, "-m", "pipeline", "sync", str(folder)], stdout=subprocess.DEVNULL)
    return done.returncode == 0


def is_complete(server: Server, folder: Path, steps: int, status: str = "FINISHED") -> bool:
    """Whether the server has one run of this folder, with every point exactly once, and its status."""
    client = MlflowClient(server.uri, server.uri)
    experiment = client.get_experiment_by_name("pipeline")
    if experiment is None:
        return False
    runs = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{folder.name}'")
    if len(runs) != 1 or runs[0].info.status != status or KEY not in runs[0].data.tags:
        return False
    expected = [values(step) for step in range(steps)]
    for name in METRICS:
        points = sorted((point.step, point.value) for point in client.get_metric_history(runs[0].info.run_id, name))
        if points != [(step, expected[step][name]) for step in range(steps)]:
            return False
    return True


class Report:
    """Prints figures, and remembers whether all were met."""

    def __init__(self) -> None:
        self.all_met = True

    def __call__(self, what: str, figure: str, met: bool) -> None:
        self.all_met &= met
        print(f"{what:<44} {figure:<64} {'met' if met else 'NOT MET'}", flush=True)


def measure_cost(report: Report, server: Server, runs: Path, steps: int) -> None:
    """Many steps: what each costs, and whether all arrive."""
    case = run_case(runs / "paced", server.uri, steps=4000, pause=_MEANWHILE)
    figure = f"{case.per_step:.3f} ms a step (at most {MOST_PER_STEP}), slowest {1000 * case.stall:.0f} ms"
    report("cost of a step, 200 steps/s", figure, case.per_step <= MOST_PER_STEP)
    began = time.perf_counter()
    case = run_case(runs / "many", server.uri, steps, pause=0)
    figure = f"{case.per_step:.3f} ms a step (at most {MOST_PER_STEP}), slowest {1000 * case.stall:.0f} ms"
    report(f"cost of a step, {steps:,} without a pause", figure, case.per_step <= MOST_PER_STEP)
    complete = is_complete(server, case.folder, steps)
    figure = f"{'equal' if complete else 'different'} on the server, after {time.perf_counter() - began:.0f} s"
    report(f"{steps:,} steps of {len(METRICS)} metrics", figure, complete)


def measure_outages(report: Report, server: Server, runs: Path, outage: float) -> None:
    """Every way in which a server fails; the training goes on over the whole outage."""
    steps = int((outage + 10) / _MEANWHILE)
    proxy = Proxy(server.port)

    def fails(mode: str) -> Callable[[], None]:
        def meanwhile() -> None:
            time.sleep(3)
            proxy.mode = mode  # type: ignore[assignment]
            time.sleep(outage)
            proxy.forward()

        return meanwhile

    def restarts() -> None:
        time.sleep(3)
        server.kill()
        time.sleep(outage / 3)
        server.start()

    cases: list[tuple[str, str, Callable[[], None] | None]] = [
        (f"answering 500 for {outage:.0f} s", proxy.uri, fails("error")),
        (f"hanging for {outage:.0f} s", proxy.uri, fails("hang")),
        (f"dropping a third of the replies for {outage:.0f} s", proxy.uri, fails("drop")),
        ("killed and restarted", server.uri, restarts),
    ]
    for number, (what, uri, meanwhile) in enumerate(cases):
        case = run_case(runs / f"outage-{number}", uri, steps, _MEANWHILE, meanwhile)
        _report_outage(report, server, what, case, steps)
    # The server was never there, and is started where the run expected it.
    late = Server(server.folder)
    case = run_case(runs / "absent", late.uri, steps, _MEANWHILE)
    late.store = f"sqlite:///{server.folder / 'late.db'}"
    late.start()
    try:
        _report_outage(report, late, "absent for the whole run", case, steps)
    finally:
        late.kill()
    proxy.close()


def _report_outage(report: Report, server: Server, what: str, case: Case, steps: int) -> None:
    complete = sync(case.folder) and is_complete(server, case.folder, steps)
    again = sync(case.folder) and is_complete(server, case.folder, steps)
    figure = f"stall {1000 * case.stall:.0f} ms, exit code {case.code}, after sync "
    figure += "every point once, one run" if complete and again else "NOT EQUAL"
    report(what, figure, case.stall <= MOST_STALL and case.code == 0 and complete and again)


def measure_kill(report: Report, server: Server, runs: Path) -> None:
    """SIGKILL in the middle: what was written before arrives, and the run ends as KILLED."""
    folder = runs / "killed"
    command = [sys.executable, __file__, "--train", str(folder), server.uri, "100000", str(_MEANWHILE)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (folder / "journal.jsonl").is_file():
        time.sleep(0.05)
    time.sleep(4)
    process.send_signal(signal.SIGKILL)
    code = process.wait()
    steps = (folder / "journal.jsonl").read_bytes().count(b'"op":"metrics"')
    complete = sync(folder) and is_complete(server, folder, steps, "KILLED")
    figure = f"exit code {128 - code}, after sync {steps:,} steps, {'KILLED' if complete else 'NOT EQUAL'}"
    report("SIGKILL", figure, complete and code == -signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="of the long run; default: %(default)s")
    parser.add_argument("--outage", type=float, default=30, help="seconds of each outage; default: %(default)s")
    parser.add_argument("--train", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train is not None:
        folder, uri, steps, pause = given.train
        train(Path(folder), uri, int(steps), float(pause))
        return 0
    report = Report()
    with tempfile.TemporaryDirectory() as scratch:
        runs = Path(scratch) / "runs"
        server = Server(Path(scratch))
        server.start()
        try:
            measure_cost(report, server, runs, given.steps)
            measure_kill(report, server, runs)
            measure_outages(report, server, runs, given.outage)
        finally:
            server.kill()
    return 0 if report.all_met else 1


if __name__ == "__main__":
    sys.exit(main())
